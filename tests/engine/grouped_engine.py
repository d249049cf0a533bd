"""Engines with layers in several KV groups, and what is done to their copies in the tests of all
kinds of groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from conserve.core.kv_groups import KVGroup
from conserve.engine.settings import EngineSettings
from tests.engine.device import Device
from tests.engine.engine import Engine, make_scheduler
from tests.engine.test_checkpoints import (
    FAST,
    NO_WISHES,
    SLOT_BYTES,
    run_bursts,
    worker_half,
)

MakeEngine = Callable[..., Engine]

MISFORTUNES = ("swap", "slow link", "small pool", "failing copies")


def make_grouped(
    folder: Path,
    groups: tuple[KVGroup, ...],
    depth: int,
    *,
    num_blocks: int,
    num_slots: int = 2048,
    bytes_per_s: float = FAST,
    mode: str = "incremental",
    pace: int = 3,
    fail: Any = None,
    wishes: Mapping[str, Any] = NO_WISHES,
    **options: Any,
) -> Engine:
    """`num_blocks` of all groups together; `depth` steps in flight. Its scheduler is to be shut
    down."""
    settings = EngineSettings(
        **wishes,
        profile_seconds=0,
        checkpoint=mode,
        checkpoint_bytes=num_slots * SLOT_BYTES,
        checkpoint_bytes_per_s=bytes_per_s,
    )
    scheduler = make_scheduler(
        folder,
        settings=settings,
        async_scheduling=depth > 1,
        num_blocks=num_blocks,
        groups=groups,
        **options,
    )
    device = Device(4, groups=groups)
    device.connector = worker_half(scheduler, device, pace, fail)
    return Engine(scheduler, device, depth=depth)


def stop_and_cancel(
    make_engine: MakeEngine,
    groups: tuple[KVGroup, ...],
    depth: int,
    chance: Random,
    shared: tuple[int, int, int],
) -> None:
    """Bursts on three engines, whose prompts share so many tokens each."""
    num_stops, num_loaded = 0, 0
    for seed, num_shared in enumerate(shared):
        engine = make_engine(groups, depth, pace=seed + 1)
        engine.stop = lambda step: chance.random() < 0.4
        run_bursts(engine, seed, shared=num_shared, cancel=True)
        num_stops += engine.num_stops
        num_loaded += engine.device.connector.worker_side.copies.copier.copies.num_loaded
    assert num_stops
    assert num_loaded


def suffer(
    make_engine: MakeEngine, groups: tuple[KVGroup, ...], misfortune: str, num_seeds: int
) -> None:
    """Bursts on engines whose copies meet with one of MISFORTUNES."""
    chance = Random(1)
    options: dict[str, dict[str, Any]] = {
        "swap": {"mode": "swap"},
        "slow link": {"bytes_per_s": FAST / 50, "pace": 1, "max_step_tokens": 64},
        "small pool": {"num_slots": 14 * len(groups)},
        "failing copies": {"fail": lambda doing: chance.random() < 0.1},
    }
    for seed in range(num_seeds):
        run_bursts(make_engine(groups, **options[misfortune]), seed)
