"""KV groups in one memory: blocks of each are copied and come back, whatever shapes layers see."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from conserve.engine.checkpoint.making import packing_of_all, planes_of, widest_planes
from conserve.engine.checkpoint.packing import UnknownLayoutError, cpu, whole
from conserve.engine.checkpoint.rows import BlockRows
from conserve.engine.checkpoint.store import SlotStore
from conserve.engine.door import group_kernel_blocks
from tests.engine.layers import CPU, attention_layer

pytestmark = pytest.mark.engine

NUM_BLOCKS = 6


def memory(*shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """One allocation, seen as blocks of those shapes, [heads, tokens, content] each."""
    raw = torch.arange(NUM_BLOCKS * torch.Size(shapes[0]).numel(), dtype=torch.float32)
    return {str(shape): raw.view(NUM_BLOCKS, *shape) for shape in shapes}


def copied(caches: dict[str, torch.Tensor]) -> SlotStore:
    """Blocks 1 and 2 to slots, wiped, and brought back; a part of a block is asked for."""
    planes = widest_planes(planes_of(caches, NUM_BLOCKS))
    store = SlotStore(planes, 4, packing=whole)
    before = {name: cache.clone() for name, cache in caches.items()}
    assert not store.write([1, 2], [3, 0], [(5, 7), (0, 1)])
    for cache in caches.values():
        cache[1:3] = -1
    assert not store.read([3, 0], [1, 2])
    assert all(torch.equal(cache, before[name]) for name, cache in caches.items())
    return store


def test_groups_whose_layers_are_alike_are_one_to_the_copies() -> None:
    caches = memory((2, 4, 16))
    assert copied({**caches, "another group's": caches["(2, 4, 16)"]}).slots.slot_bytes == 512


@pytest.mark.parametrize("other", [(2, 8, 8), (1, 4, 32), (1, 16, 8)], ids=str)
def test_groups_of_other_shapes_are_copied_as_bytes(other: tuple[int, int, int]) -> None:
    store = copied(memory((2, 4, 16), other))
    assert store.slots.slot_bytes == 512
    assert store.tokens_apart is None


def test_where_shapes_differ_no_part_of_a_block_is_addressed() -> None:
    alike, other = memory((2, 32, 64)), memory((2, 32, 64), (1, 64, 64))
    layers = dict.fromkeys(other, attention_layer(CPU, isa="vec"))
    assert packing_of_all(alike, layers) is cpu
    assert packing_of_all(other, layers) is whole


def test_blocks_that_are_woven_into_each_other_are_refused() -> None:
    raw = torch.zeros(NUM_BLOCKS, 4, 2, 16)
    planes = [raw.transpose(1, 2), raw.view(NUM_BLOCKS, 1, 8, 16)]
    with pytest.raises(UnknownLayoutError, match="woven"):
        widest_planes(planes)


def test_rows_of_a_block_are_gathered_once_whoever_sees_them() -> None:
    """As on CUDA, where blocks hold the pages of all layers: of one group as of another."""
    raw = torch.randint(0, 100, (NUM_BLOCKS, 96), dtype=torch.int8)
    one = [raw[:, :64].view(NUM_BLOCKS, 2, 4, 8), raw[:, 64:96].view(NUM_BLOCKS, 1, 4, 8)]
    other = [raw[:, :48].unflatten(1, (2, 3, 8)), raw[:, 48:80].unflatten(1, (1, 4, 8))]
    rows = BlockRows([*one, *other, one[0]])
    assert rows.slot_bytes == 96
    before, staged = raw.clone(), torch.zeros((2, 96), dtype=torch.int8)
    rows.gather([4, 1], staged)
    raw[[1, 4]] = -1
    rows.scatter(staged, [4, 1])
    assert torch.equal(raw, before)


def test_layers_are_told_apart_by_what_they_see() -> None:
    caches = memory((2, 4, 16), (2, 8, 8))
    assert len(planes_of(caches, NUM_BLOCKS)) == 2
    assert len(planes_of({**caches, "same": caches["(2, 4, 16)"]}, NUM_BLOCKS)) == 2


def hybrid() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two places in memory: attention and recurrent layers share one, in the other is attention
    alone, in blocks that are two of its kernel's. Recurrent layers see bytes. (caches by layer,
    the two places)"""
    places = {name: torch.randn(NUM_BLOCKS, 128) for name in ("shared", "attention's")}
    shared = places["shared"]
    return {
        "attention": shared.view(2 * NUM_BLOCKS, 2, 4, 8),
        "recurrent": shared.view(torch.int8)[:, None, None, :],
        "more attention": places["attention's"].view(2 * NUM_BLOCKS, 2, 4, 8),
    }, places


def test_recurrent_layers_share_memory_with_some_of_the_others() -> None:
    caches, _ = hybrid()
    store = copied({name: group_kernel_blocks(cache, NUM_BLOCKS) for name, cache in caches.items()})
    assert store.slots.slot_bytes == 2 * 512
    assert store.tokens_apart is None


def test_states_go_as_bytes_where_nothing_else_is_there() -> None:
    """No attention layer says how tokens lie in its blocks."""
    states = {f"layer {n}": torch.randn(NUM_BLOCKS, 128).view(torch.int8) for n in range(2)}
    caches = {name: state[:, None, None, :] for name, state in states.items()}
    assert packing_of_all(caches, dict.fromkeys(caches, object())) is whole
    assert copied(caches).slots.slot_bytes == 2 * 512


def test_a_state_keeps_parts_of_blocks_from_being_addressed() -> None:
    """Though it lies in memory of its own."""
    attention = memory((2, 32, 64))
    layers = dict.fromkeys(attention, attention_layer(CPU, isa="vec"))
    state = torch.zeros(NUM_BLOCKS, 1, 1, 64, dtype=torch.int8)
    assert packing_of_all(attention, layers) is cpu
    assert packing_of_all({**attention, "state": state}, {**layers, "state": object()}) is whole


def test_rows_of_blocks_with_recurrent_state_are_gathered_whole() -> None:
    """As on CUDA."""
    caches, places = hybrid()
    rows = BlockRows(planes_of(caches, NUM_BLOCKS))
    assert rows.slot_bytes == 2 * 512
    before = {name: place.clone() for name, place in places.items()}
    staged = torch.zeros((2, rows.slot_bytes), dtype=torch.int8)
    rows.gather([4, 1], staged)
    for place in places.values():
        place[[1, 4]] = -1
    rows.scatter(staged, [4, 1])
    assert all(torch.equal(place, before[name]) for name, place in places.items())
