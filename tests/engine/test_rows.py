"""Blocks of every memory order of vLLM's, gathered into one stretch and scattered elsewhere."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch

from conserve.engine.checkpoint.packing import UnknownLayoutError
from conserve.engine.checkpoint.rows import BlockRows
from tests.engine.test_checkpoint_store import (
    BLOCKS,
    CONTENT,
    HEADS,
    LAYERS,
    ORDERS,
    TOKENS,
    planes_in,
)

pytestmark = pytest.mark.engine

BLOCK_BYTES = LAYERS * HEADS * TOKENS * CONTENT * 2


def filled(order: str) -> list[torch.Tensor]:
    planes = planes_in(order)
    chance = torch.Generator().manual_seed(7)
    for plane in planes:
        plane.copy_(torch.rand(plane.shape, generator=chance))
    return planes


def there_and_back(planes: list[torch.Tensor]) -> None:
    """Blocks 5 and 1 are gathered, and scattered into 2 and 3; nothing else changes."""
    before = [plane.clone() for plane in planes]
    rows = BlockRows(planes)
    staged = torch.zeros((3, rows.slot_bytes), dtype=torch.int8)
    rows.gather([5, 1], staged)
    assert not staged[2].any()
    rows.scatter(staged[:2], [2, 3])
    for plane, was in zip(planes, before, strict=True):
        assert torch.equal(plane[2], was[5])
        assert torch.equal(plane[3], was[1])
        assert torch.equal(plane[[0, 1, 4, 5]], was[[0, 1, 4, 5]])


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_go_there_and_back(order: str) -> None:
    planes = filled(order)
    assert BlockRows(planes).slot_bytes == BLOCK_BYTES
    there_and_back(planes)


def test_layers_in_allocations_of_their_own() -> None:
    planes = [plane.clone() for plane in filled("LBHNC")]
    assert BlockRows(planes).slot_bytes == BLOCK_BYTES
    there_and_back(planes)


def test_layers_of_two_widths() -> None:
    planes = filled("LBHNC")
    there_and_back([*planes, *(plane[..., : CONTENT // 2].contiguous() for plane in planes)])


def test_layers_of_two_widths_in_one_allocation() -> None:
    memory = torch.rand(3 * BLOCKS * HEADS * TOKENS * CONTENT)
    wide, narrow = memory.split([2 * len(memory) // 3, len(memory) // 3])
    shape = (BLOCKS, HEADS, TOKENS, CONTENT)
    there_and_back([wide.view(*shape[:3], 2 * CONTENT), narrow.view(shape)])


def test_an_allocation_that_holds_more_than_kv() -> None:
    """A page may be padded, and what is read and written is the page alone."""
    memory = torch.rand((LAYERS, BLOCKS, HEADS * TOKENS * CONTENT + 8))
    planes = [layer[:, :-8].view(BLOCKS, HEADS, TOKENS, CONTENT) for layer in memory]
    padding = memory[..., -8:].clone()
    there_and_back(planes)
    assert torch.equal(memory[..., -8:], padding)


def test_blocks_of_several_kernel_pages() -> None:
    kernel_blocks = filled("LBHNC")
    before = [plane.clone() for plane in kernel_blocks]
    rows = BlockRows([plane.unflatten(0, (BLOCKS // 2, 2)) for plane in kernel_blocks])
    staged = torch.zeros((1, rows.slot_bytes), dtype=torch.int8)
    rows.gather([2], staged)
    rows.scatter(staged, [0])
    for plane, was in zip(kernel_blocks, before, strict=True):
        assert torch.equal(plane[:2], was[4:])
        assert torch.equal(plane[2:], was[2:])


def test_a_layer_that_uses_anothers_kv_is_copied_once() -> None:
    planes = filled("LBHNC")
    assert BlockRows([*planes, planes[0]]).slot_bytes == BLOCK_BYTES


def test_kv_of_inference_mode() -> None:
    with torch.inference_mode():
        planes = filled("LBHNC")
        rows = BlockRows(planes)
        staged = torch.zeros((1, rows.slot_bytes), dtype=torch.int8)
    rows.gather([1], staged)
    rows.scatter(staged, [4])
    assert all(torch.equal(plane[4], plane[1]) for plane in planes)


def test_block_ids_go_to_cuda_without_the_host_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = BlockRows(filled("LBHNC"))
    rows.device = torch.device("cuda")
    sent = SimpleNamespace(to=lambda device, non_blocking: (device.type, non_blocking))
    words: dict[str, object] = {}
    monkeypatch.setattr(torch, "tensor", lambda _, **given: words.update(given) or sent)
    assert rows._on_device([1, 2]) == ("cuda", True)
    assert words["pin_memory"]


def test_what_is_no_block_is_refused() -> None:
    rows = BlockRows(filled("LBHNC"))
    staged = torch.zeros((1, rows.slot_bytes), dtype=torch.int8)
    for block in (-1, BLOCKS):
        with pytest.raises(LookupError, match=f"beyond {BLOCKS - 1}"):
            rows.gather([block], staged)
    with pytest.raises(UnknownLayoutError, match="not paged by block"):
        BlockRows([torch.zeros(7)])
    with pytest.raises(UnknownLayoutError, match="there is no KV"):
        BlockRows([])
