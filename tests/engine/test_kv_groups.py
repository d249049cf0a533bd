"""Layers in several KV groups, some with a window: blocks are counted as vLLM hands them out, and
checkpoints bring all groups back to one token. Through vLLM's own scheduler and KV manager.

P2: no copy reads a block that a window has left. P3, P4: what is restored is what was computed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.core.kv_groups import KVGroup
from conserve.engine.checkpoint.columns import Columns
from conserve.engine.checkpoint.entry import Held
from conserve.engine.checkpoint.pool import HostPool, Worth
from conserve.engine.checkpoint.under_way import Sent
from conserve.engine.kv_groups import kv_group_of, kv_groups_of
from conserve.engine.steps import GENERIC_MODEL
from tests.engine.copies import ForeignCopyError
from tests.engine.device import VOCABULARY, StaleReadError
from tests.engine.engine import Engine, make_request, spec_of
from tests.engine.grouped_engine import (
    MISFORTUNES,
    MakeEngine,
    make_grouped,
    stop_and_cancel,
    suffer,
)
from tests.engine.test_checkpoints import (
    run_bursts,
    totals_of,
)
from tests.engine.test_conversations import QUICK, Talk

pytestmark = pytest.mark.engine

FULL, SLIDING = KVGroup(4), KVGroup(4, window=10)
MODELS = {
    "one window": (KVGroup(4, window=9),),
    "window and full": (FULL, SLIDING),
    "many windows": (FULL, SLIDING, SLIDING, SLIDING),
    "two windows": (KVGroup(4, window=6), FULL, KVGroup(4, window=21)),
    "blocks of two sizes": (KVGroup(8), KVGroup(4, window=13)),
    "chunks": (FULL, KVGroup(4, chunk=12)),
}
"""Like Mistral's, GPT-OSS's, Gemma 3's, Gemma 4's and Llama 4's."""


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[MakeEngine]:
    made: list[Any] = []

    def make(
        groups: tuple[KVGroup, ...],
        depth: int = 1,
        *,
        num_blocks: int = 26,
        window_blocks: int = 26,
        **options: Any,
    ) -> Engine:
        in_all = sum(num_blocks if g.keeps_all else window_blocks for g in groups)
        engine = make_grouped(tmp_path, groups, depth, num_blocks=in_all, **options)
        made.append(engine.scheduler)
        return engine

    yield make
    for scheduler in made:
        scheduler.shutdown()


# Blocks are counted as vLLM hands them out


@pytest.mark.parametrize("groups", MODELS.values(), ids=MODELS)
def test_a_window_leaves_blocks_where_vllm_says(groups: tuple[KVGroup, ...]) -> None:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.single_type_kv_cache_manager import get_manager_for_kv_cache_spec

    for group in groups:
        pool = BlockPool(64, enable_caching=True, hash_block_size=4)
        manager = get_manager_for_kv_cache_spec(
            kv_cache_spec=spec_of(group), max_in_flight_tokens=32, max_model_len=512,
            block_pool=pool, enable_caching=True, kv_cache_group_id=0, scheduler_block_size=8,
        )  # fmt: skip
        for num_tokens in range(100):
            left = manager.get_num_skipped_tokens(num_tokens) // group.block_size
            assert group.first_needed(num_tokens) == left, (group, num_tokens)


@pytest.mark.parametrize("groups", MODELS.values(), ids=MODELS)
def test_what_requests_lack_is_what_vllm_takes_or_more(
    make_engine: MakeEngine, groups: tuple[KVGroup, ...]
) -> None:
    """Of the pool, while requests run: they hold no less than is counted as freed when they go, and
    no more is ever taken than was counted as lacking."""
    engine = make_engine(groups, num_blocks=80, window_blocks=80)
    scheduler, chance = engine.scheduler, random.Random(3)
    counted = kv_groups_of(scheduler)
    assert counted is not None
    for i in range(4):
        prompt = [chance.randrange(1, VOCABULARY) for _ in range(30 + 17 * i)]
        engine.add(make_request(f"r{i}", prompt, 30, online=bool(i % 2), arrival_s=0.0))
    most: dict[str, int] = {}
    while scheduler.has_unfinished_requests():
        engine.step()
        for request in scheduler.running:
            name, computed = request.request_id, request.num_computed_tokens
            managers = scheduler.kv_cache_manager.coordinator.single_type_managers
            tables = [manager.req_to_blocks[name] for manager in managers]
            held = sum(not block.is_null for table in tables for block in table)
            assert counted.blocks_for(computed, computed) <= held
            assert held <= counted.blocks_for(request.num_tokens, 0)
            most[name] = max(most.get(name, 0), held)
    assert len(most) == 4


def test_layers_are_grouped_by_what_vllm_keeps_of_them() -> None:
    import torch
    from vllm.v1 import kv_cache_interface as kinds

    def spec(kind: str, **more: Any) -> Any:
        fields = {"block_size": 16, "num_kv_heads": 2, "head_size": 16, "dtype": torch.float32}
        return getattr(kinds, kind)(**fields | more)

    window = spec("SlidingWindowSpec", sliding_window=64, extra_retained_tokens=3)
    assert kv_group_of(window, 9) == KVGroup(16, window=67, most_blocks=9)
    several = kinds.UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": window})
    assert kv_group_of(several, 9) == KVGroup(16, window=67, most_blocks=9)
    kept = spec("FullAttentionSpec", sliding_window=64)
    assert kv_group_of(kept) == KVGroup(16), "vLLM computes a window and keeps all"
    state: dict[str, Any] = {"block_size": 16, "shapes": ((4,),), "dtypes": (torch.float32,)}
    last = kv_group_of(kinds.MambaSpec(**state, mamba_cache_mode="align"))
    assert [last.first_needed(n) for n in (0, 1, 16, 17, 18)] == [0, 0, 0, 1, 1]
    assert last.blocks_for(1000, 0) == 2
    assert last.is_state
    once = kv_group_of(kinds.MambaSpec(**state | {"block_size": 512}))
    assert once == KVGroup(512, is_state=True, most_blocks=1)
    assert [once.blocks_for(n, 0) for n in (1, 512)] == [1, 1]


def test_one_group_of_all_tokens_needs_no_groups(make_engine: MakeEngine) -> None:
    assert kv_groups_of(make_engine((FULL,)).scheduler) is None


# Requests come back as they were


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("groups", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("seed", range(3))
def test_displaced_requests_come_back_as_they_were(
    make_engine: MakeEngine, groups: tuple[KVGroup, ...], depth: int, seed: int
) -> None:
    engine = make_engine(groups, depth, pace=seed + 1)
    totals = totals_of(engine)
    run_bursts(engine, seed)
    assert totals["displaced_requests"] > 0
    assert totals["restored_tokens memory"] > 0


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("groups", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("shared", [0, 13], ids=["distinct", "shared-prefix"])
def test_stops_and_cancels_beside_copies(
    make_engine: MakeEngine, groups: tuple[KVGroup, ...], depth: int, shared: int
) -> None:
    stop_and_cancel(make_engine, groups, depth, random.Random(shared), (shared,) * 3)


@pytest.mark.parametrize("mode", MISFORTUNES)
@pytest.mark.parametrize("groups", MODELS.values(), ids=MODELS)
def test_whatever_becomes_of_the_copies(
    make_engine: MakeEngine, groups: tuple[KVGroup, ...], mode: str
) -> None:
    suffer(make_engine, groups, mode, num_seeds=3)


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("name", [name for name in MODELS if len(MODELS[name]) > 1])
def test_conversations_come_back_from_the_host(
    make_engine: MakeEngine, name: str, depth: int
) -> None:
    """Beside a sweep of documents, with stops. With a window alone they stay on the device."""
    groups, chance, num_restored = MODELS[name], random.Random(depth), 0.0
    for seed in range(3):
        wishes = {"slo_ttft_s": QUICK, "checkpoint_online": True}
        engine = make_engine(
            groups, depth, num_blocks=44, window_blocks=20, pace=8 * len(groups), wishes=wishes
        )
        engine.seconds = lambda record: GENERIC_MODEL.predict_s(record.shape)  # type: ignore[method-assign]
        engine.stop = lambda step: chance.random() < 0.2
        totals = totals_of(engine)
        Talk(engine, seed).run()
        num_restored += totals.get("online_restored_tokens", 0.0)
    assert num_restored


def test_copies_end_where_a_window_leaves_their_blocks(make_engine: MakeEngine) -> None:
    """A link that is slower than the window moves: what copies had not come to is gone."""
    ended = 0
    for seed in range(6):
        engine = make_engine(
            MODELS["two windows"], num_blocks=60, window_blocks=60, pace=1, max_step_tokens=64
        )
        checkpointer = engine.scheduler.checkpointer
        end = checkpointer._end_behind_windows

        def count(end: Any = end, checkpointer: Any = checkpointer) -> None:
            nonlocal ended
            ended += len(checkpointer.under_way.left_behind(checkpointer.holds))
            end()

        checkpointer._end_behind_windows = count
        run_bursts(engine, seed)
    assert ended


def test_a_checkpoint_holds_no_more_of_a_window_than_it_needs() -> None:
    """However long its request, and it is restored to its end, and to the token before."""
    window = KVGroup(4, window=10)
    pool = HostPool(1000, 4, groups=(FULL, window))
    for num_tokens in range(1, 300):
        held = Held.of(pool.groups, num_tokens, num_tokens - 1)
        assert pool.grow("a", num_tokens, [], Worth(1.0), held=held)
        pool.written("a", num_tokens, [])
        entry = pool.get("a")
        assert entry is not None
        assert len(entry.columns[0].slots) == -(-num_tokens // 4)
        assert len(entry.columns[1].slots) <= 5
        assert pool.num_restorable_tokens("a", num_tokens) == num_tokens
        assert pool.num_restorable_tokens("a", num_tokens - 1) == num_tokens - 1
    pool.drop("a")
    assert not pool.num_used_slots


def test_what_a_window_left_before_it_was_copied_brings_nobody_back() -> None:
    """Until copies have caught up: a window further on all is there."""
    pool = HostPool(1000, 4, groups=(FULL, KVGroup(4, window=10)))

    def copy(num_tokens: int, num_computed: int, start: int) -> bool:
        held = Held.of(pool.groups, num_computed, start)
        assert pool.grow("a", num_tokens, [], Worth(1.0), held=held)
        pool.written("a", num_tokens, [])
        return pool.num_restorable_tokens("a", num_tokens) == num_tokens

    assert copy(8, 8, 0)
    assert not copy(12, 40, 8)
    assert not copy(34, 40, 12)
    assert copy(44, 44, 34)


def test_a_prefix_is_found_where_all_groups_have_what_it_takes() -> None:
    """Of all layers everything, of those with a window its last blocks: no more is copied."""
    hashes = [f"h{i}" for i in range(40)]
    pool = HostPool(1000, 4, groups=(FULL, KVGroup(4, window=10)))
    pool.grow("a", 100, hashes[:25], Worth(1.0), held=Held.of(pool.groups, 100, 0))
    pool.written("a", 100, hashes[:25])
    assert pool.num_shared_tokens(hashes) == 100
    assert pool.num_shared_tokens(hashes, 99) == 100
    assert pool.num_shared_tokens(hashes[:24]) == 0, "its window is not there"
    assert pool.num_shared_tokens(["other", *hashes[1:]]) == 0


def has_all(pool: HostPool, hashes: list[str], num_tokens: int, most: float) -> bool:
    return all(
        pool._columns.known(number, hashes, index) is not None
        for number, group in enumerate(pool.groups)
        for index in range(
            group.first_needed(int(min(num_tokens, most))), num_tokens // group.block_size
        )
    )


@pytest.mark.parametrize("groups", MODELS.values(), ids=MODELS)
def test_the_longest_prefix_is_found_that_all_groups_have(groups: tuple[KVGroup, ...]) -> None:
    """As a look at every length from the longest on would find it."""
    chance, size, each = random.Random(5), 8, 4
    found = set()
    for _ in range(60):
        pool = HostPool(4000, size, groups=groups, hash_tokens=each)
        hashes = [f"h{i}" for i in range(40)]
        for name in "abc":
            same, num_tokens = chance.randrange(40), chance.randrange(1, 160)
            mine = [*hashes[:same], *(f"{name}{i}" for i in range(same, 40))][: num_tokens // each]
            held = Held.of(pool.groups, num_tokens, 0)
            assert pool.grow(name, num_tokens, mine, Worth(1.0), held=held)
            pool.written(name, num_tokens, mine)
        most = chance.choice([math.inf, chance.randrange(1, 161)])
        longest = next(n for n in range(160, -1, -size) if has_all(pool, hashes, n, most))
        assert pool.num_shared_tokens(hashes, most) == longest
        found.add(longest)
    assert len(found) > 3


def test_a_prefix_whose_window_has_gone_costs_one_look_at_each_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is asked for in each step while a chat waits that begins as a long document does."""
    hashes, num_looks = [f"h{i}" for i in range(1000)], 0
    groups = (FULL, SLIDING, SLIDING)
    pool = HostPool(4000, 4, groups=groups)
    assert pool.grow("a", 4000, hashes, Worth(1.0), held=Held.of(groups, 4000, 0))
    pool.written("a", 4000, hashes)
    known = Columns.known

    def counted(*args: Any) -> Any:
        nonlocal num_looks
        num_looks += 1
        return known(*args)

    monkeypatch.setattr(Columns, "known", counted)
    assert pool.num_shared_tokens([*hashes[:900], *(f"x{i}" for i in range(100))]) == 0
    assert num_looks < 2 * len(hashes)


# Negative controls


def restore_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Careless: a restore fills the blocks of the first group alone."""
    places = HostPool.places

    def careless(self: HostPool, *args: Any) -> Any:
        return [place for place in places(self, *args) if not place.group]

    monkeypatch.setattr(HostPool, "places", careless)


def copy_on_behind_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Careless: copies go on out of blocks that the window has left."""
    monkeypatch.setattr(Sent, "has_left", lambda *_: False)


def copy_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Careless: blocks of the first group alone are copied."""
    spans = HostPool.spans

    def careless(self: HostPool, *args: Any) -> Any:
        return [span for span in spans(self, *args) if not span.group]

    monkeypatch.setattr(HostPool, "spans", careless)


def fill_what_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Careless: slots stay that were meant for blocks which the window has left."""
    monkeypatch.setattr(Columns, "_lost", lambda *_: False)


@pytest.mark.parametrize(
    "careless", [restore_one_group, copy_one_group, copy_on_behind_the_window, fill_what_is_gone]
)
def test_careless_checkpoints_of_groups_are_caught(
    make_engine: MakeEngine, careless: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    careless(monkeypatch)

    def run_some() -> None:
        for seed in range(12):
            run_bursts(make_engine(MODELS["window and full"], pace=1, max_step_tokens=64), seed)

    with pytest.raises((ForeignCopyError, StaleReadError)):
        run_some()
