"""Everything at once for hundreds of turns, with what the other tests leave out: the tier on disk
beside copies that dawdle and fail, conversations, drafts, resets, salts, and names used again.

The pretend device sees every foreign read (P2, P3). In the end nothing is left of anybody.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.engine.door import RequestStatus
from conserve.engine.steps import GENERIC_MODEL
from tests.engine.device import VOCABULARY
from tests.engine.engine import BLOCK_SIZE, Engine, make_request
from tests.engine.test_checkpoints import (
    SLOT_BYTES,
    MakeEngine,
    assert_nothing_left,
    make_engine,
    totals_of,
)

__all__ = ["make_engine"]
pytestmark = pytest.mark.engine

NUM_TURNS = 600
LONGEST_OUTPUT = 24


@dataclass
class Crowd:
    """Requests of both classes that come, go on, are cancelled, and come back under their name."""

    engine: Engine
    chance: random.Random
    alive: dict[str, tuple[list[int], int]] = field(default_factory=dict)
    """Name -> prompt, output tokens."""
    histories: list[list[int]] = field(default_factory=list)
    num_added: int = 0

    def __post_init__(self) -> None:
        self.scheduler = self.engine.scheduler
        self.head = self._words(13)

    def _words(self, count: int) -> list[int]:
        return [self.chance.randrange(1, VOCABULARY) for _ in range(count)]

    def run(self, resets: float) -> None:
        for _ in range(NUM_TURNS):
            self._some_come()
            self.engine.step()
            self._count()
            if self.alive and self.chance.random() < 0.06:
                self._cancel(self.chance.choice(sorted(self.alive)))
            if self.chance.random() < resets:
                assert self.scheduler.reset_prefix_cache(True, True)
            if self.chance.random() < 0.01:
                self.scheduler.clock.now_s += self.chance.choice([1, 10, 200])
        self.engine.run()
        self._count()
        assert not self.alive

    def _some_come(self) -> None:
        num_online = sum(name.startswith("on") for name in self.alive)
        if len(self.alive) - num_online < 12 and self.chance.random() < 0.6:
            self._add(online=False)
        if num_online < 10 and self.chance.random() < 0.15:
            self._add(online=True)

    def _add(self, *, online: bool) -> None:
        self.num_added += 1
        again = self.chance.random() < 0.1
        number = self.chance.randrange(self.num_added) if again else self.num_added
        name = f"{'on' if online else 'off'}{number}"
        if name in self.scheduler.requests:
            return
        prompt, num_output = self._prompt(online=online), self.chance.randrange(1, LONGEST_OUTPUT)
        now_s, salt = self.scheduler.clock.now_s, self.chance.choice([None, None, "salt"])
        self.engine.finished.discard(name)
        self.engine.add(
            make_request(name, prompt, num_output, online=online, arrival_s=now_s, salt=salt)
        )
        self.alive[name] = (prompt, num_output)

    def _prompt(self, *, online: bool) -> list[int]:
        words = self._words(self.chance.randrange(3, 60))
        if online and self.histories and self.chance.random() < 0.6:
            number = self.chance.randrange(len(self.histories))
            words = self.histories.pop(number) + words[:8]
        elif self.chance.random() < 0.4:
            words = self.head + words
        num_blocks = self.scheduler.kv_cache_manager.block_pool.num_gpu_blocks
        most = BLOCK_SIZE * num_blocks - 2 * LONGEST_OUTPUT
        return words if len(words) <= most else words[: most // 2]

    def _count(self) -> None:
        for name in sorted(self.engine.finished & self.alive.keys()):
            prompt, num_output = self.alive.pop(name)
            assert len(self.engine.outputs[name]) == num_output, name
            if name.startswith("on") and len(self.histories) < 12:
                self.histories.append(prompt + self.engine.outputs[name])

    def _cancel(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        del self.alive[name]


def assert_nobody_is_remembered(engine: Engine) -> None:
    """Behind `assert_nothing_left`: no slot, hash or name."""
    scheduler, host = engine.scheduler, engine.scheduler.checkpointer
    pool, table, conversations = host.pool, host.pool._table, host.conversations
    assert len(table.free) == pool.num_slots
    assert len(table.free_on_disk) == pool.num_disk_slots
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    by_name = {
        "owners": [table.num_owners, table._num_online_owners],
        "hashes": [table.slot_of, table.hash_of],
        "entries": [pool._entries, pool._too_large],
        "copies": [host._loaded, host.refusals._num_used, host.under_way._by_request],
        "conversations": [conversations._silent, conversations._going_on],
        "loads": [scheduler.finished_recving_kv_req_ids, scheduler.failed_recving_kv_req_ids],
        "requests": [scheduler.requests, scheduler._inflight_prefills],
        "blocks": [manager.req_to_blocks for manager in managers],
    }
    left = {what: kept for what, kept in by_name.items() if any(kept)}
    assert not left


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("num_drafts", [0, 3])
@pytest.mark.parametrize("fails", [0.0, 0.02], ids=["whole", "failing"])
def test_nothing_is_left_of_anybody(
    make_engine: MakeEngine, tmp_path: Path, depth: int, num_drafts: int, fails: float
) -> None:
    chance = random.Random(f"{depth} {num_drafts} {fails}")
    fail, stop, right = (random.Random(seed) for seed in (1, 2, 3))
    wishes: dict[str, Any] = {"slo_ttft_s": 0.002, "checkpoint_online": True}
    wishes |= {"checkpoint_dir": str(tmp_path), "checkpoint_dir_bytes": 40 * SLOT_BYTES}
    engine = make_engine(
        depth,
        wishes=wishes,
        num_blocks=44,
        num_slots=30,
        pace=2,
        num_spec_tokens=num_drafts,
        fail=lambda operation: fail.random() < fails,
    )
    engine.seconds = lambda record: GENERIC_MODEL.predict_s(record.shape)  # type: ignore[method-assign]
    engine.stop = lambda step: stop.random() < 0.2
    engine.device.num_accepted = lambda: right.randrange(num_drafts + 1)
    totals = totals_of(engine)
    Crowd(engine, chance).run(resets=0.005)
    assert totals["checkpoint_evictions demoted"] > 0
    assert totals["restored_tokens memory"] > 0
    assert totals["online_restored_tokens"] > 0
    assert_nothing_left(engine)
    assert_nobody_is_remembered(engine)
