"""Where the KV of a token range lies inside a block, for each layout that vLLM's CPU kernels use.
On other devices blocks are copied whole (rows.py).

vLLM hands every layer's KV as [num_blocks, num_kv_heads, block_size, content], whatever the
order in memory, but the last two axes do not always mean what they say:

    cpu       [heads, [K: dim, token] [V: token, dim]]         CPU kernels; keys are transposed
    cpu_amx   K and V in tiles of 16 tokens                    CPU kernels with AMX
    whole     unknown: only the block as a whole can be addressed

Some layouts weave neighbouring tokens together. A *granule* is the least number of tokens that
can be addressed apart; a copy of fewer takes the others along. That is harmless: those before
the range are rewritten with what they were, those behind it hold nothing valid yet.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from conserve.engine.door import cpu_attn_reshape_and_cache

BACKENDS = "vllm.v1.attention.backends"
CPU_BACKEND = f"{BACKENDS}.cpu_attn.CPUAttentionBackend"
CPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
AMX_TILE = 16


class UnknownLayoutError(ValueError):
    """KV cache tensors that cannot be addressed by block."""


class Part(NamedTuple):
    """A view of pages in which `axis` counts granules of tokens."""

    view: torch.Tensor
    axis: int
    granule: int

    def of(self, page: int, start: int, stop: int) -> torch.Tensor:
        """Tokens [start, stop) of one page, widened to whole granules."""
        first = start // self.granule
        length = -(-stop // self.granule) - first
        return self.view[page].narrow(self.axis - 1, first, length)


Packing = Callable[[torch.Tensor], list[Part]]
"""Pages [pages, layers, heads, tokens, content] -> their parts. Raises UnknownLayoutError."""


def whole(pages: torch.Tensor) -> list[Part]:
    return [Part(pages.unsqueeze(1), 1, pages.shape[3])]


def cpu(pages: torch.Tensor) -> list[Part]:
    keys, values = _halves(pages)
    num_tokens = pages.shape[3]
    return [
        Part(keys.unflatten(-1, (-1, num_tokens)), 4, 1),
        Part(values.unflatten(-1, (num_tokens, -1)), 3, 1),
    ]


def cpu_amx(pages: torch.Tensor) -> list[Part]:
    keys, values = _halves(pages)
    num_tokens, size = pages.shape[3], pages.shape[4] // 2
    if num_tokens % AMX_TILE or size % AMX_TILE:
        raise UnknownLayoutError(f"{num_tokens} tokens of {size} values are not in tiles of 16")
    tiles = num_tokens // AMX_TILE
    return [
        Part(keys.unflatten(-1, (tiles, -1)), 3, AMX_TILE),
        Part(values.unflatten(-1, (size // AMX_TILE, tiles, -1)), 4, AMX_TILE),
    ]


def _halves(pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of each head, [pages, layers, heads, tokens * size]."""
    try:
        flat = pages.view(*pages.shape[:3], -1)
    except RuntimeError:
        raise UnknownLayoutError("a head's part of a block is not contiguous") from None
    keys, values = flat.chunk(2, dim=-1)
    return keys, values


CPU_PACKINGS: dict[str, Packing] = {"vec": cpu, "vec16": cpu, "amx": cpu_amx}
"""By the instruction set that vLLM's CPU kernel uses."""


def packing_for(layer: Any, plane: torch.Tensor) -> Packing:
    """What holds for an attention layer of vLLM's and its KV on a CPU. It depends on the
    instruction set of the kernel, which is asked. What is not known is copied by whole blocks."""
    backend = f"{layer.attn_backend.__module__}.{layer.attn_backend.__qualname__}"
    if backend != CPU_BACKEND or plane.dtype not in CPU_DTYPES:
        return whole
    isa = str(getattr(layer, "isa", ""))
    packing = CPU_PACKINGS.get(isa)
    write = partial(write_token, isa)
    if packing is None or not is_right(packing, plane.shape[-3:], plane.dtype, write):
        return whole
    return packing


def write_token(isa: str, block: torch.Tensor, token: int) -> None:
    """Have vLLM's CPU kernel store ones as a token's KV into `block`, [heads, tokens, content]."""
    heads, num_tokens, content = block.shape
    keys, values = block.view(1, heads, 2 * num_tokens, content // 2).chunk(2, dim=2)
    ones = torch.ones((1, heads, content // 2), dtype=block.dtype)
    cpu_attn_reshape_and_cache(ones, ones, keys, values, torch.tensor([token]), isa)


def is_right(
    packing: Packing,
    shape: Sequence[int],
    dtype: torch.dtype,
    write: Callable[[torch.Tensor, int], None],
) -> bool:
    """Whether every byte that the kernel itself writes for a token lies where `packing` says.

    shape: [heads, tokens, content]. `write(block, token)` has the backend's own kernel store
    a token without zeros into `block`, [heads, tokens, content].
    """
    page = torch.zeros((1, 1, *shape), dtype=dtype)
    named = torch.zeros_like(page)
    try:
        parts = packing(named)
    except UnknownLayoutError:
        return False
    for token in range(shape[1]):
        page.zero_()
        named.zero_()
        write(page[0, 0], token)
        for part in parts:
            part.of(0, token, token + 1).fill_(1)
        if not page.any() or bool(((page != 0) & (named == 0)).any()):
            return False
    return True


def stack(planes: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """One view [blocks, layers, heads, tokens, content] of all layers that lie evenly spaced in
    one allocation; as few views as there are such groups. Layers that share one KV count once.

    planes: [blocks, heads, tokens, content]; with an axis of pages behind the blocks, they are
    counted as one. Raises UnknownLayoutError for anything else.
    """
    alike: dict[Any, list[torch.Tensor]] = defaultdict(list)
    seen: set[tuple[int, int]] = set()
    for one in planes:
        plane = one
        if plane.dim() == 5 and plane.stride(0) == plane.shape[1] * plane.stride(1):
            plane = plane.flatten(0, 1)
        if plane.dim() != 4:
            raise UnknownLayoutError(f"KV of shape {tuple(plane.shape)} is not paged by block")
        place = (plane.untyped_storage().data_ptr(), plane.storage_offset())
        if place not in seen:
            seen.add(place)
            alike[place[0], plane.shape, plane.stride(), plane.dtype].append(plane)
    views = []
    for group in alike.values():
        group.sort(key=torch.Tensor.storage_offset)
        views += [_evenly(run) for run in _runs(group)]
    if not views:
        raise UnknownLayoutError("there is no KV")
    return views


def _runs(group: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Cut where the distance from one layer to the next changes."""
    runs: list[list[torch.Tensor]] = []
    for plane in group:
        step = plane.storage_offset() - runs[-1][-1].storage_offset() if runs else 0
        if runs and step == (_step(runs[-1]) or step):
            runs[-1].append(plane)
        else:
            runs.append([plane])
    return runs


def _step(run: list[torch.Tensor]) -> int:
    return 0 if len(run) < 2 else int(run[1].storage_offset() - run[0].storage_offset())


def _evenly(run: list[torch.Tensor]) -> torch.Tensor:
    first = run[0]
    shape = (first.shape[0], len(run), *first.shape[1:])
    stride = (first.stride(0), _step(run), *first.stride()[1:])
    return first.as_strided(shape, stride)
