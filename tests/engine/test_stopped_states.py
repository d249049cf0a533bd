"""A stopped forward leaves recurrent state as it was: from the connector's call before a forward to
the layer where it stops."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

from conserve.core.kv_groups import KVGroup
from conserve.engine import kept_states
from conserve.engine.connector import ConserveConnector, StepMetadata
from conserve.engine.kept_states import KeptStates, Rows
from conserve.engine.safepoints import Safepoints, StopStep
from tests.engine.device import Device
from tests.engine.engine import make_request, make_scheduler

pytestmark = pytest.mark.engine

NUM_LAYERS = 4
ROWS: Rows = {0: [2, 5]}


class MambaMixer2:
    """A layer of vLLM's kind, which adds to the state of the step's requests."""

    def __init__(self, number: int) -> None:
        self.kv_cache = (torch.full((8, 3), float(number)), torch.full((8, 2, 2), -float(number)))

    def conv_ssm_forward(self) -> None:
        for state in self.kv_cache:
            state[ROWS[0]] += 1


class Flag:
    """Up at one safepoint of stoppable steps."""

    def __init__(self, point: int | None) -> None:
        self.point = point

    def lead(self, step: int, point: int) -> bool:
        return point == self.point


class Worker:
    """One rank's connector and its layers."""

    def __init__(self, stops_at: int | None) -> None:
        self.layers = {f"layer {i}": MambaMixer2(i) for i in range(NUM_LAYERS)}
        spec = MambaSpec(
            block_size=512, shapes=((3,), (2, 2)), dtypes=(torch.float32, torch.float32)
        )
        group = SimpleNamespace(kv_cache_spec=spec, layer_names=list(self.layers))
        vllm_config: Any = SimpleNamespace(
            additional_config={},
            scheduler_config=SimpleNamespace(max_num_seqs=4),
            compilation_config=SimpleNamespace(static_forward_context=self.layers),
        )
        flag: Any = Flag(stops_at)
        self.connector: Any = object.__new__(ConserveConnector)
        self.connector._vllm_config = vllm_config
        side: Any = SimpleNamespace(
            safepoints=Safepoints(flag, rank=0),
            states=KeptStates(vllm_config, SimpleNamespace(kv_cache_groups=[group])),
            clock=SimpleNamespace(launches=lambda: None),
            copies=SimpleNamespace(register=lambda *_: None),
        )
        self.connector.worker_side = side
        self.connector.register_kv_caches({})

    def step(self, stoppable_step: int | None) -> bool:
        """Run one forward. Returns whether it came to its end."""
        metadata = StepMetadata(stoppable_step=stoppable_step, states=ROWS)
        self.connector.bind_connector_metadata(metadata)
        try:
            for layer in self.layers.values():
                layer.conv_ssm_forward()
        except StopStep:
            return False
        finally:
            self.connector.clear_connector_metadata()
        return True

    def states(self) -> list[torch.Tensor]:
        return [state.clone() for layer in self.layers.values() for state in layer.kv_cache]


def are_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("stops_at", range(NUM_LAYERS))
def test_a_step_that_is_stopped_and_run_again_has_run_once(stops_at: int) -> None:
    worker, undisturbed = Worker(stops_at), Worker(None)
    before = worker.states()
    assert not worker.step(7)
    assert are_equal(worker.states(), before)
    assert worker.step(None)
    assert undisturbed.step(None)
    assert are_equal(worker.states(), undisturbed.states())


def test_state_that_is_not_put_back_shows() -> None:
    """The negative control."""
    worker = Worker(2)
    before = worker.states()
    with patch.object(KeptStates, "put_back", lambda self: None):
        assert not worker.step(7)
    assert not are_equal(worker.states(), before)


def test_a_step_that_runs_to_its_end_keeps_what_it_wrote() -> None:
    worker, undisturbed = Worker(None), Worker(None)
    for step in (1, 2):
        assert worker.step(step)
        assert undisturbed.step(None)
    assert are_equal(worker.states(), undisturbed.states())


def lines_of(method: Callable[..., Any], *calls: str) -> Iterator[int]:
    """Where the first of each of these calls is, in the text of a method of vLLM's."""
    text = inspect.getsource(method)
    for call in calls:
        assert call in text, f"{method.__qualname__} does not call {call!r} any more"
        yield text.index(call)


@pytest.mark.parametrize(
    ("method", "calls"),
    [
        (
            RunnerV1.execute_model,
            ("preprocess_mamba(", "self.maybe_get_kv_connector_output(", "self._model_forward("),
        ),
        (
            RunnerV2.execute_model,
            ("model_state.preprocess_state(", "self.kv_connector.pre_forward("),
        ),
    ],
    ids=["V1", "V2"],
)
def test_vllm_copies_states_between_blocks_before_it_calls_connectors(
    method: Callable[..., Any], calls: tuple[str, ...]
) -> None:
    assert all(one < later for one, later in pairwise(lines_of(method, *calls)))


FULL, AT_ENDS = KVGroup(4), KVGroup(4, is_state=True)
NUM_KEPT, BYTES_OF_REQUEST = 3, 512


def test_a_stoppable_step_continues_no_more_requests_than_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that start in it bring states from the prefix cache: with them it may be too many."""
    monkeypatch.setattr(kept_states, "KEPT_BYTES", NUM_KEPT * BYTES_OF_REQUEST)
    groups, prompt, num_rows = (AT_ENDS, FULL), [*range(9)], [0]
    scheduler = make_scheduler(tmp_path, groups=groups, num_blocks=200, max_step_tokens=64)
    device = Device(4, groups=groups)
    for i in range(24):
        tokens, length = [*prompt, *range(20 + i, 30)], 6 + i % 5
        request = make_request(f"off{i}", tokens, length, online=False, arrival_s=float(i))
        scheduler.add_request(request)
        for _ in range(1 + i % 3):
            output = scheduler.schedule()
            step = output.kv_connector_metadata
            if step.stoppable_step is not None:
                num_rows.append(max(map(len, step.states.values())))
            scheduler.update_from_output(output, device.run(output))
    scheduler.shutdown()
    assert max(num_rows) == NUM_KEPT
