"""Who gets checkpoints, and how large their pool is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.engine.checkpoint import sizes
from conserve.engine.checkpoint.checkpointer import Checkpointer
from conserve.engine.checkpoint.orders import Report
from conserve.engine.checkpoint.sizes import PoolSize, make_checkpointer, why_no_checkpoints
from conserve.engine.launch import GPU_WORKER
from conserve.engine.settings import EngineSettings
from conserve.engine.sides import SchedulerSide
from conserve.engine.speculation import SHOWN
from conserve.engine.stats import EngineStats

pytestmark = pytest.mark.engine

SLOT_BYTES = 2 * 4096


def group(kind: str = "FullAttentionSpec", **more: Any) -> Any:
    """Two layers of one kind, 4 KiB a block each in float32."""
    import torch
    from vllm.v1 import kv_cache_interface

    if kind == "MambaSpec":
        spec = kv_cache_interface.MambaSpec(
            **{"block_size": 16, "shapes": ((1024,),), "dtypes": (torch.float32,)} | more
        )
        return SimpleNamespace(kv_cache_spec=spec, layer_names=["one", "two"])
    fields = {"block_size": 16, "num_kv_heads": 2, "head_size": 16, "dtype": torch.float32}
    spec = getattr(kv_cache_interface, kind)(**fields | more)
    return SimpleNamespace(kv_cache_spec=spec, layer_names=["one", "two"])


def engine(groups: Any = None, **changes: Any) -> Any:
    """An engine that can keep checkpoints, but for the changes."""
    values = {
        "block_size": 16,
        "needs_kv_cache_zeroing": False,
        "worker_cls": GPU_WORKER,
        "is_encoder_decoder": False,
        "speculative_config": None,
        "runner_type": "generate",
        "world_size": 1,
        "enable_prefix_caching": True,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "num_blocks": 100,
        "kv_cache_groups": groups or [group()],
    } | changes
    part = SimpleNamespace(**values)
    part.parallel_config = part.model_config = part.cache_config = part
    return part


def reason(part: Any, **settings: Any) -> str:
    return why_no_checkpoints(part, part, EngineSettings(**settings))


def size_of(part: Any, checkpoint_bytes: int) -> PoolSize:
    return PoolSize.of(part, part, EngineSettings(checkpoint_bytes=checkpoint_bytes))


def make(part: Any, checkpoint_bytes: int) -> Checkpointer:
    settings = EngineSettings(checkpoint_bytes=checkpoint_bytes)
    return make_checkpointer(part, part, settings, EngineStats())


def test_recurrent_state_of_drafts_is_not_covered() -> None:
    groups = [group(), group("MambaSpec")]
    assert reason(engine(groups)) == ""
    for method in SHOWN:
        drafting = SimpleNamespace(method=method)
        assert reason(engine(speculative_config=drafting)) == ""
        assert "drafts" in reason(engine(groups, speculative_config=drafting))


def test_a_plain_cache_is_covered() -> None:
    assert reason(engine()) == ""
    assert reason(engine(world_size=4), checkpoint="swap") == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"needs_kv_cache_zeroing": True, "worker_cls": "auto"}, "clears new blocks"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"speculative_config": SimpleNamespace(method="medusa")}, "drafts"),
        ({"runner_type": "pooling"}, "pooling"),
        ({"decode_context_parallel_size": 2}, "context parallelism"),
        ({"prefill_context_parallel_size": 2}, "context parallelism"),
    ],
    ids=str,
)
def test_others_recompute_and_say_why(change: dict[str, Any], words: str) -> None:
    assert words in reason(engine(**change))


def test_windows_chunks_and_several_groups_are_covered() -> None:
    window = group("SlidingWindowSpec", sliding_window=64)
    chunk = group("ChunkedLocalAttentionSpec", attention_chunk_size=64)
    assert reason(engine([window])) == ""
    assert reason(engine([group(), window, window])) == ""
    assert reason(engine([group(), chunk])) == ""
    assert reason(engine([group(sliding_window=64)])) == "", "its blocks are kept, all of them"


def test_recurrent_state_is_covered_alone_and_beside_others() -> None:
    """Restoring it takes a slot a group, whatever the request's length."""
    once, at_ends = group("MambaSpec", block_size=1000), group("MambaSpec")
    assert reason(engine([once], needs_kv_cache_zeroing=True)) == ""
    assert reason(engine([group(), at_ends], needs_kv_cache_zeroing=True)) == ""
    hybrid = make(engine([once, group(), once]), checkpoint_bytes=0)
    assert hybrid.pool.block_size == 16
    assert hybrid.pool.slot_tokens == 16
    assert hybrid.pool.state_tokens == 2 * 16
    assert hybrid.bandwidth.token_bytes == SLOT_BYTES / 16
    alone = make(engine([once]), checkpoint_bytes=0)
    assert alone.pool.state_tokens == alone.pool.slot_tokens == 1000


def test_nothing_is_kept_of_conversations_with_recurrent_state() -> None:
    settings = EngineSettings(checkpoint_online=True)
    for groups, keeps in (([group()], True), ([group(), group("MambaSpec")], False)):
        part = engine(groups)
        keeper = make_checkpointer(part, part, settings, EngineStats())
        assert (keeper.conversations is not None) is keeps


def test_caches_that_are_not_plain() -> None:
    assert "another cache" in reason(engine([group(), group(tokens_per_state=4)]))
    sinks = group("SinkFullAttentionSpec", sink_len=16)
    assert "another cache" in reason(engine([group(), sinks]))


def test_a_slot_holds_a_block_of_any_group() -> None:
    """They have their blocks from the same memory. A token takes a part of one in each."""
    wide = group(num_kv_heads=6)
    part = engine([group(), wide, group("SlidingWindowSpec", sliding_window=64, block_size=32)])
    assert sizes.slot_bytes_of(part) == 3 * SLOT_BYTES
    keeper = make(part, checkpoint_bytes=0)
    assert keeper.pool.slot_tokens == pytest.approx(1 / (2 / 16 + 1 / 32))
    assert keeper.bandwidth.token_bytes == pytest.approx(3 * SLOT_BYTES * (2 / 16 + 1 / 32))
    assert keeper.pool.block_size == 32
    assert keeper.pool.hash_tokens == 16


def test_layers_of_several_widths_are_counted_each() -> None:
    """A worker is told of every layer; the scheduler of one."""
    specs = {name: group(num_kv_heads=n).kv_cache_spec for name, n in (("one", 2), ("two", 6))}
    several = SimpleNamespace(kv_cache_specs=specs)
    part = engine([SimpleNamespace(kv_cache_spec=several, layer_names=["one", "two"])])
    assert reason(part) == ""
    assert sizes.slot_bytes_of(part) == 4096 + 3 * 4096


def test_switched_off_and_without_our_connector() -> None:
    assert "switched off" in reason(engine(), checkpoint="off")
    assert "no ConserveConnector" in SchedulerSide.without_connector().checkpointer.unusable


@pytest.mark.parametrize(("world_size", "num_slots"), [(1, 10), (2, 5)])
def test_the_pool_is_for_all_ranks_together(world_size: int, num_slots: int) -> None:
    size = size_of(engine(world_size=world_size), 10 * SLOT_BYTES + 1)
    assert not size.why_none
    assert size.num_slots == num_slots


def test_a_pool_smaller_than_a_block_is_none() -> None:
    assert "not one block" in size_of(engine(), SLOT_BYTES - 1).why_none


def test_the_scheduler_takes_what_the_workers_have_whatever_is_left_free_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They pin their memory before it is built: a share of what is free would be less by then."""
    monkeypatch.setattr(sizes, "available_bytes", lambda: 100 * SLOT_BYTES)
    worker = size_of(engine(), checkpoint_bytes=0)
    monkeypatch.setattr(sizes, "available_bytes", lambda: SLOT_BYTES)
    made = make(engine(), checkpoint_bytes=0)
    made.take(Report(pools=[worker.num_slots]))
    assert made.pool.num_slots == worker.num_slots == 25


def test_by_default_it_is_a_share_of_free_memory_or_of_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sizes, "available_bytes", lambda: 4000)
    assert sizes.default_bytes(10_000) == 1000
    assert sizes.default_bytes(100) == 400


@pytest.mark.parametrize(
    ("keeps", "prefix_caching", "wishes"),
    [
        (True, True, {}),
        (False, False, {}),
        (False, True, {"checkpoint_online": False}),
        (False, True, {"checkpoint": "swap"}),
        (False, True, {"checkpoint": "off"}),
    ],
)
def test_what_online_requests_leave_is_found_by_hash(
    keeps: bool, prefix_caching: bool, wishes: dict[str, Any]
) -> None:
    part = engine(enable_prefix_caching=prefix_caching)
    keeper = make_checkpointer(part, part, EngineSettings(**wishes), EngineStats())
    assert (keeper.conversations is not None) == keeps
