"""Whose blocks go first, over vLLM's own KV manager: an oracle keeps who used which block."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.core.settings import PolicySettings
from conserve.engine.retention import num_common
from conserve.engine.settings import EngineSettings
from tests.engine.device import VOCABULARY, Device, expected_output
from tests.engine.engine import BLOCK_SIZE, Engine, make_request, make_scheduler

pytestmark = pytest.mark.engine

MakeEngine = Callable[..., Engine]


def num_found(engine: Engine, request: Any) -> int:
    """Tokens of its prompt that a new request finds in the prefix cache; runs it to its end."""
    engine.add(request)
    schedule = engine.scheduler.schedule
    found: dict[str, int] = {}

    def noted() -> Any:
        output = schedule()
        found.update((new.req_id, new.num_computed_tokens) for new in output.scheduled_new_reqs)
        return output

    engine.scheduler.schedule = noted
    engine.run()
    engine.scheduler.schedule = schedule
    return found[request.request_id]


class HistoryTakenError(AssertionError):
    """An offline request was given a block of online history while another was free."""


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[MakeEngine]:
    made: list[Any] = []

    def make(*, depth: int = 1, class_aware: bool = True, **options: Any) -> Engine:
        policy = PolicySettings(class_aware=class_aware)
        settings = EngineSettings(profile_seconds=0, checkpoint="off", policy=policy)
        scheduler = make_scheduler(
            tmp_path, settings=settings, async_scheduling=depth > 1, **options
        )
        made.append(scheduler)
        return Engine(scheduler, Device(BLOCK_SIZE), depth=depth)

    yield make
    for scheduler in made:
        scheduler.shutdown()


class Oracle:
    """Watches vLLM's pool and manager: which blocks with content an online request used last."""

    def __init__(self, scheduler: Any) -> None:
        self.history: set[int] = set()
        self.num_taken = self.num_kept = 0
        """Blocks handed out; and of online history, left alone while others were taken."""
        self._manager = scheduler.kv_cache_manager
        self._pool = self._manager.block_pool
        self._get_new_blocks = self._pool.get_new_blocks
        self._free_request_blocks = scheduler._free_request_blocks
        self._pool.get_new_blocks = self.get_new_blocks
        scheduler._free_request_blocks = self.free_request_blocks

    def free_request_blocks(self, request: Any) -> None:
        blocks = self._manager.coordinator.get_blocks(request.request_id)[0]
        if request.priority <= 0:
            self.history |= {b.block_id for b in blocks if b.block_hash is not None}
        self._free_request_blocks(request)

    def get_new_blocks(self, num_blocks: int) -> list[Any]:
        free = {b.block_id for b in self._pool.blocks if b.ref_cnt == 0 and not b.is_null}
        taken: list[Any] = self._get_new_blocks(num_blocks)
        ids = {block.block_id for block in taken}
        left_over = free - ids - self.history
        if ids & self.history and left_over:
            raise HistoryTakenError(f"{ids & self.history} taken, {left_over} were free")
        self.num_taken += len(ids)
        self.num_kept += len((free & self.history) - ids)
        self.history -= ids
        return taken


def converse(engine: Engine, seed: int) -> None:
    """Conversations that grow beside documents, which share their beginnings; all answers right."""
    chance = random.Random(seed)
    heads = [[chance.randrange(1, VOCABULARY) for _ in range(13)] for _ in range(2)]
    talks = [[chance.randrange(1, VOCABULARY) for _ in range(6)] for _ in range(3)]
    wanted: dict[str, list[int]] = {}

    def send(name: str, prompt: list[int], length: int, online: bool) -> None:
        arrival_s = engine.scheduler.clock.now_s
        engine.add(make_request(name, prompt, length, online=online, arrival_s=arrival_s))
        wanted[name] = expected_output(prompt, length)

    for turn in range(12):
        for i in range(chance.randrange(4)):
            text = [chance.randrange(1, VOCABULARY) for _ in range(chance.randrange(3, 40))]
            head = chance.choice([*heads, []])
            send(f"doc{turn}-{i}", head + text, chance.randrange(2, 12), False)
        if chance.random() < 0.7:
            talk = chance.choice(talks)
            send(f"turn{turn}", list(talk), 3, True)
            talk += [*wanted[f"turn{turn}"], *(chance.randrange(1, VOCABULARY) for _ in range(3))]
        for _ in range(chance.randrange(2, 12)):
            engine.step()
    engine.run()
    assert engine.outputs == wanted


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_offline_work_takes_no_online_history_while_others_are_free(
    make_engine: MakeEngine, seed: int, depth: int
) -> None:
    engine = make_engine(depth=depth, num_blocks=40 + seed % 3 * 12)
    oracle = Oracle(engine.scheduler)
    converse(engine, seed)
    assert oracle.num_taken
    assert oracle.num_kept


def test_the_oracle_catches_vllms_own_order(make_engine: MakeEngine) -> None:
    engine = make_engine(class_aware=False, num_blocks=40)
    Oracle(engine.scheduler)
    with pytest.raises(HistoryTakenError):
        converse(engine, seed=0)


def test_a_conversation_that_pauses_beside_a_sweep_is_found_again(make_engine: MakeEngine) -> None:
    """Its history is a fifth of memory, and the sweep of fresh documents goes over all of it
    several times. With vLLM's order all of it is gone."""

    def turn_beside_a_sweep(class_aware: bool) -> int:
        engine = make_engine(class_aware=class_aware, num_blocks=60)
        chat = list(range(1, 49))
        engine.add(make_request("first", chat, 1, online=True, arrival_s=0.0))
        engine.run()
        for i in range(20):
            document = list(range(100 + i * 40, 140 + i * 40))
            engine.add(make_request(f"doc{i}", document, 4, online=False, arrival_s=1.0))
        engine.run()
        again = make_request("second", [*chat, 5, 6, 7], 1, online=True, arrival_s=2.0)
        return num_found(engine, again)

    assert turn_beside_a_sweep(class_aware=True) == 48
    assert turn_beside_a_sweep(class_aware=False) == 0


@pytest.mark.parametrize(("class_aware", "found"), [(True, 20), (False, 0)])
def test_a_prefix_that_a_waiting_document_shares_outlives_those_that_none_does(
    make_engine: MakeEngine, class_aware: bool, found: int
) -> None:
    """One slot: a document with the shared head, two that fill memory, then the head again."""
    engine = make_engine(class_aware=class_aware, num_blocks=26, max_num_seqs=1)
    head, others = list(range(1, 21)), [list(range(100, 176)), list(range(200, 276))]
    for i, prompt in enumerate([[*head, 66, 67], *others]):
        engine.add(make_request(f"doc{i}", prompt, 1, online=False, arrival_s=float(i)))
    late = make_request("late", [*head, 77, 78], 1, online=False, arrival_s=3.0)
    assert num_found(engine, late) == found


def test_emptying_the_prefix_cache_forgets_whose_the_blocks_were(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=24)
    engine.add(make_request("chat", list(range(1, 30)), 2, online=True, arrival_s=0.0))
    engine.run()
    (queue,) = engine.scheduler.retention.queues
    assert queue.order.num_online
    assert engine.scheduler.reset_prefix_cache()
    assert queue.order.num_online == 0


def test_the_queue_answers_as_vllms_own_does(make_engine: MakeEngine) -> None:
    """Every call of it, on blocks that are all of one class: the same blocks in the same order."""
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue

    from conserve.engine.free_queue import FreeQueue

    ours, theirs = BlockPool(12, True, 4), BlockPool(12, True, 4)
    FreeQueue.into(ours, class_aware=True)

    def both(call: Callable[[Any, Any], Any]) -> None:
        answers = [call(pool.free_block_queue, pool.blocks) for pool in (ours, theirs)]
        shown = [
            [b.block_id for b in a] if isinstance(a, list) else getattr(a, "block_id", a)
            for a in answers
        ]
        assert shown[0] == shown[1]
        frees = [
            [b.block_id for b in pool.free_block_queue.get_all_free_blocks()]
            for pool in (ours, theirs)
        ]
        assert frees[0] == frees[1]
        assert ours.get_num_free_blocks() == theirs.get_num_free_blocks() == len(frees[0])

    both(lambda queue, blocks: queue.popleft())
    both(lambda queue, blocks: queue.popleft_n(0))
    both(lambda queue, blocks: queue.popleft_n(1))
    both(lambda queue, blocks: queue.popleft_n(4))
    both(lambda queue, blocks: queue.remove(blocks[9]))
    both(lambda queue, blocks: queue.append(blocks[3]))
    both(lambda queue, blocks: queue.append_n([blocks[2], blocks[5]]))
    both(lambda queue, blocks: queue.append_n([]))
    both(lambda queue, blocks: queue.prepend_n([blocks[4], blocks[1]]))
    both(lambda queue, blocks: queue.prepend_n([]))
    both(lambda queue, blocks: list(queue.iter_blocks_after(None)))
    both(lambda queue, blocks: list(queue.iter_blocks_after(blocks[1])))
    for pool in (ours, theirs):
        with pytest.raises(RuntimeError, match="invalid block"):
            pool.free_block_queue.remove(pool.blocks[9])
        pool.free_block_queue.popleft_n(pool.get_num_free_blocks())
        with pytest.raises(ValueError, match="No free blocks"):
            pool.free_block_queue.popleft()
    calls = {name for name in vars(FreeKVCacheBlockQueue) if not name.startswith("_")}
    assert calls <= set(dir(FreeQueue)), "vLLM's queue has calls that ours has not"


@pytest.mark.parametrize("num_groups", [1, 2])
def test_blocks_of_every_kind_of_layer_are_marked(num_groups: int, make_engine: MakeEngine) -> None:
    """A model of full and of sliding layers has a table of blocks a request for each."""
    import torch
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        SlidingWindowSpec,
    )

    from conserve.engine.retention import Retention

    common = {"block_size": BLOCK_SIZE, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    specs = [FullAttentionSpec(**common), SlidingWindowSpec(**common, sliding_window=64)]
    groups = [KVCacheGroupSpec([f"layer{i}"], spec) for i, spec in enumerate(specs[:num_groups])]
    scheduler = make_engine().scheduler
    manager = scheduler.kv_cache_manager = KVCacheManager(
        KVCacheConfig(num_blocks=20, kv_cache_tensors=[], kv_cache_groups=groups),
        max_model_len=512,
        scheduler_block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
    )
    retention = Retention(scheduler, class_aware=True)
    request = make_request("chat", list(range(1, 13)), 1, online=True, arrival_s=0.0)
    assert manager.allocate_slots(request, 12)
    used = {i for ids in manager.get_block_ids("chat") for i in ids}
    assert len(used) == 3 * num_groups
    retention.lets_go(request)
    manager.free(request)
    (queue,) = retention.queues
    assert {i for i in range(20) if queue.order.is_online(i)} == used
    assert queue.order.num_online == len(used)


@pytest.mark.parametrize(
    ("first", "second", "common"),
    [
        ("", "", 0),
        ("ab", "", 0),
        ("ab", "xb", 0),
        ("abc", "abd", 2),
        ("ab", "abc", 2),
        ("a", "a", 1),
    ],
)
def test_common_leading_hashes(first: str, second: str, common: int) -> None:
    """Letters stand for what names a block, and two that differ stay different."""

    def chained(letters: str) -> list[int]:
        return [hash(letters[: i + 1]) for i in range(len(letters))]

    assert num_common(chained(first), chained(second)) == common
    assert num_common(chained(second), chained(first)) == common
