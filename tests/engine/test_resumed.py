"""A displaced request of a model without KV comes back with its blocks named: none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.engine.stopped import StoppedOutput
from tests.engine.engine import Engine, make_request, make_scheduler

pytestmark = pytest.mark.engine

PROMPT = list(range(1, 21))


class Stopped:
    """A device on which no offline step comes to its end."""

    def __init__(self, scheduler: Any) -> None:
        self._requests = scheduler.requests

    def run(self, output: Any, stop_at: int | None = None) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        names = list(output.num_scheduled_tokens)
        if "offline" in names:
            return StoppedOutput.of(names, 1, None)
        index = {name: i for i, name in enumerate(names)}
        return ModelRunnerOutput(names, index, sampled_token_ids=[[7] for _ in names])


def test_a_displaced_request_without_kv_comes_back_with_no_blocks(tmp_path: Path) -> None:
    scheduler = make_scheduler(tmp_path, groups=(), max_num_seqs=1, chunked_prefill=False)
    engine = Engine(scheduler, Stopped(scheduler))
    now_s = scheduler.clock.now_s
    engine.add(make_request("offline", PROMPT, 1, online=False, arrival_s=now_s))
    engine.step()
    engine.add(make_request("online", PROMPT, 1, online=True, arrival_s=scheduler.clock.now_s))
    while "online" not in engine.finished:
        engine.step()
    assert scheduler.requests["offline"].num_preemptions == 1
    cached = scheduler.schedule().scheduled_cached_reqs
    assert cached.resumed_req_ids == {"offline"}
    assert cached.new_block_ids == [()]
