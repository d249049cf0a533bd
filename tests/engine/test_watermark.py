"""Blocks that vLLM keeps free of requests that start while others run (`--watermark`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from conserve.engine.snapshots import Snapshots
from tests.engine.device import Device, expected_output
from tests.engine.engine import BLOCK_SIZE, Engine, make_request, make_scheduler
from tests.engine.test_scheduler import assert_nothing_left, run_mixed

pytestmark = pytest.mark.engine

NUM_BLOCKS = 40
WATERMARK = 6


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    scheduler = make_scheduler(tmp_path, num_blocks=NUM_BLOCKS + 1, watermark=WATERMARK)
    yield Engine(scheduler, Device(BLOCK_SIZE))
    scheduler.shutdown()


def fill_then_chat(engine: Engine) -> None:
    """An arrival for which there are blocks, but for those that are to stay free."""
    for i in range(4):
        engine.add(make_request(f"off{i}", [i + 1] * 30, 60, online=False, arrival_s=float(i)))
    for _ in range(12):
        engine.step()
    pool = engine.scheduler.kv_cache_manager.block_pool
    num_free = pool.get_num_free_blocks()
    prompt = [99] * ((num_free - WATERMARK + 2) * BLOCK_SIZE)
    assert len(prompt) <= num_free * BLOCK_SIZE
    now_s = engine.scheduler.clock.now_s
    engine.add(make_request("on", prompt, 3, online=True, arrival_s=now_s))
    for _ in range(10):
        engine.step()
    assert engine.outputs["on"] == expected_output(prompt, 3)


def test_an_arrival_finds_room_above_the_watermark(engine: Engine) -> None:
    fill_then_chat(engine)
    engine.run()
    assert_nothing_left(engine)


def test_a_policy_that_counts_them_waits_for_ever(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: it plans the arrival's start, which vLLM refuses, step after step."""
    monkeypatch.setattr(
        Snapshots,
        "_num_free_blocks",
        lambda self: self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
    )
    with pytest.raises(AssertionError):
        fill_then_chat(engine)


@pytest.mark.parametrize("seed", range(4))
def test_all_get_on_beside_a_watermark(engine: Engine, seed: int) -> None:
    run_mixed(engine, seed)
    assert_nothing_left(engine)
