"""What displacing frees, and what arrivals need, against what vLLM's own block pool does."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.core.kv_groups import KVGroup, KVGroups
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import RequestView, Sharing
from conserve.engine.settings import EngineSettings
from conserve.engine.shared_blocks import SharedBlocks
from tests.engine.device import VOCABULARY, Device, expected_output
from tests.engine.engine import BLOCK_SIZE, Engine, make_request, make_scheduler

pytestmark = pytest.mark.engine

MakeEngine = Callable[..., Engine]

ONE_TABLE = (KVGroup(BLOCK_SIZE),)
WINDOWS = (*ONE_TABLE, KVGroup(BLOCK_SIZE, window=10), KVGroup(BLOCK_SIZE, window=10))


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[MakeEngine]:
    made: list[Any] = []

    def make(num_blocks: int, groups: tuple[KVGroup, ...] = ONE_TABLE) -> Engine:
        # Room for conversations would leave fewer documents to be displaced.
        policy = PolicySettings(room_min_share=0.0)
        settings = EngineSettings(profile_seconds=0, checkpoint="off", policy=policy)
        scheduler = make_scheduler(
            tmp_path, settings=settings, num_blocks=num_blocks, groups=groups
        )
        made.append(scheduler)
        return Engine(scheduler, Device(BLOCK_SIZE, groups=groups))

    yield make
    for scheduler in made:
        scheduler.shutdown()


class Freed:
    """Compares each displacement's freed blocks with what its snapshot promised."""

    def __init__(self, scheduler: Any) -> None:
        self.pool = scheduler.kv_cache_manager.block_pool
        self.driver = scheduler.driver
        managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        self.has_windows = len(managers) > 1
        self.num_shared = self.num_compared = 0
        self._snapshot: Any = None
        planner, displace = self.driver.planner, self.driver._displace

        def plan(snapshot: Any, model: Any, settings: Any) -> Any:
            self._snapshot = snapshot
            return planner(snapshot, model, settings)

        def compared(plan: Any, now_s: float) -> None:
            before = self.pool.get_num_free_blocks()
            displace(plan, now_s)
            if plan.displace:
                self.compare(set(plan.displace), self.pool.get_num_free_blocks() - before)

        self.driver.planner, self.driver._displace = plan, compared

    def compare(self, names: set[str], num_freed: int) -> None:
        sharing: Sharing = self._snapshot.sharing
        offline = [view for view in self._snapshot.running if not view.online]
        gone = [view for view in offline if view.request_id in names]
        promised = sum(map(sharing.freed_by, gone))
        if len(gone) == len(offline):
            promised += sharing.num_among_offline
        self.num_compared += 1
        self.num_shared += sum(sharing.num_shared.get(name, 0) for name in names)
        # Several victims may share what no other holds: that is free as well, and not counted on.
        assert promised <= num_freed
        # Of a window a request may hold more for now than it counts for: what it has just left.
        assert len(gone) > 1 or self.has_windows or promised == num_freed


def prompt_of(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(1, VOCABULARY) for _ in range(count)]


@pytest.mark.parametrize("groups", [ONE_TABLE, WINDOWS], ids=["one table", "windows"])
@pytest.mark.parametrize("seed", range(6))
def test_a_displacement_frees_what_the_snapshot_says(
    make_engine: MakeEngine, seed: int, groups: tuple[KVGroup, ...]
) -> None:
    """Documents with one beginning, and chats that begin so, too, or not."""
    engine, chance = make_engine(60 * len(groups), groups), random.Random(seed)
    freed, head = Freed(engine.scheduler), prompt_of(chance, 24)
    wanted: dict[str, list[int]] = {}

    def send(name: str, prompt: list[int], length: int, *, online: bool) -> None:
        arrival_s = engine.scheduler.clock.now_s
        engine.add(make_request(name, prompt, length, online=online, arrival_s=arrival_s))
        wanted[name] = expected_output(prompt, length)

    for i in range(14):
        send(f"doc{i}", head + prompt_of(chance, chance.randrange(3, 30)), 16, online=False)
    for i in range(10):
        for _ in range(chance.randrange(2, 9)):
            engine.step()
        start = head if chance.random() < 0.3 else []
        send(f"chat{i}", start + prompt_of(chance, chance.randrange(40, 120)), 3, online=True)
    engine.run()
    assert engine.outputs == wanted
    assert freed.num_compared
    assert freed.num_shared


def test_documents_that_share_their_beginning_fit_beside_each_other(
    make_engine: MakeEngine,
) -> None:
    """Memory for two of them if each had a beginning of its own; they have one."""
    engine, chance = make_engine(26), random.Random(1)
    head = prompt_of(chance, 32)
    engine.add(make_request("doc0", [*head, 1], 12, online=False, arrival_s=0.0))
    for _ in range(3):
        engine.step()
    for i in range(1, 8):
        document = head + prompt_of(chance, 3)
        engine.add(make_request(f"doc{i}", document, 4, online=False, arrival_s=float(i)))
    most = 0
    while len(engine.finished) < 8:
        engine.step()
        most = max(most, len(engine.scheduler.running))
    assert most == 8


def test_documents_yield_to_a_chat_that_begins_like_one_that_runs(make_engine: MakeEngine) -> None:
    """Together they hold less than all that it has, and more than what it lacks."""
    engine, chance = make_engine(60), random.Random(2)
    head = prompt_of(chance, 136)
    engine.add(make_request("first", [*head, 1], 80, online=True, arrival_s=0.0))
    for i in range(3):
        document = prompt_of(chance, 40)
        engine.add(make_request(f"doc{i}", document, 60, online=False, arrival_s=float(i)))
    pool = engine.scheduler.kv_cache_manager.block_pool
    while pool.get_num_free_blocks() > 4:
        engine.step()
    now_s = engine.scheduler.clock.now_s
    chat = [*head, *prompt_of(chance, 32)]
    engine.add(make_request("second", chat, 2, online=True, arrival_s=now_s))
    engine.step()
    assert {"first", "second"} <= {r.request_id for r in engine.scheduler.running}
    engine.run()
    assert engine.outputs["second"] == expected_output(chat, 2)


class Block:
    """One of vLLM's, in a table of which looks are counted."""

    num_looks = 0

    def __init__(self, block_id: int) -> None:
        self.block_id, self.ref_cnt = block_id, 1

    @property
    def is_null(self) -> bool:
        Block.num_looks += 1
        return not self.block_id


def test_what_windows_have_left_is_not_looked_through() -> None:
    """In each step while an arrival lacks room: blocks that are gone are most of a long table."""
    table = [Block(0)] * 4000 + [Block(i) for i in range(1, 9)]
    names = [f"r{i}" for i in range(64)]
    managers = [SimpleNamespace(req_to_blocks=dict.fromkeys(names, table)) for _ in WINDOWS]
    found = tuple([*table[:-1], Block(9)] for _ in WINDOWS)
    coordinator = SimpleNamespace(
        single_type_managers=managers, find_longest_cache_hit=lambda *_: (found, 0)
    )
    requests = {
        name: SimpleNamespace(request_id=name, priority=i % 2, num_tokens=16000, block_hashes=[])
        for i, name in enumerate([*names, "chat"])
    }
    scheduler = SimpleNamespace(
        kv_cache_manager=SimpleNamespace(coordinator=coordinator),
        running=[requests[name] for name in names],
        requests=requests,
        block_size=BLOCK_SIZE,
    )
    chat = RequestView(
        request_id="chat", online=True, arrival_s=0.0, num_tokens=16000, num_borrowed_blocks=8
    )
    Block.num_looks = 0
    sharing = SharedBlocks(scheduler, KVGroups(WINDOWS)).look([chat], [], 0, 1)
    assert sharing.num_lasting == {"chat": 7 * len(WINDOWS)}
    num_found = sum(map(len, found))
    assert Block.num_looks - num_found < 20 * len(names) * len(WINDOWS)
