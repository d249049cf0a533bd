"""Recurrent state, which a forward updates in place: copies of what a stoppable step touches, to
be put back when it is stopped.

A state is one row a request and layer, whatever is in it (of a convolution, of the recurrence).
The scheduler names the rows, the workers copy them between two forwards on the stream that the
forwards run on, and vLLM's own copies between blocks (`mamba_cache_mode` "align") are behind them
already: what is put back is what the forward would have read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from conserve.engine.door import MambaSpec, current_platform
from conserve.engine.scheduler_view import SchedulerView
from conserve.engine.settings import EngineSettings

KEPT_BYTES = 2 << 30
"""What a rank's copies may take: an H100 reads and writes as much in 1.3 ms."""
KEPT_SHARE = 1 / 32
"""Of a GPU's memory, where that is less: a small one needs it for KV."""

Rows = dict[int, list[int]]
"""KV cache group -> blocks that hold a request's state."""


def recurrent_groups(kv_cache_config: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the group, what the state of each of its layers is)"""
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        specs = getattr(spec, "kv_cache_specs", {})
        if isinstance(spec, MambaSpec):
            yield number, dict.fromkeys(group.layer_names, spec)
        elif specs and all(isinstance(one, MambaSpec) for one in specs.values()):
            yield number, specs


def bytes_of_request(specs: Mapping[str, Any]) -> int:
    """Of the recurrent state in all of these layers; 0 where there is none."""
    return sum(
        prod(shape) * dtype.itemsize
        for spec in specs.values()
        if isinstance(spec, MambaSpec)
        for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)
    )


def num_kept(vllm_config: Any, specs: Mapping[str, Any]) -> int:
    """Requests of a step whose state is copied, at most; 0 where there is none, or too much, or
    where stops are switched off."""
    if EngineSettings.of(vllm_config.additional_config).stop == "off":
        return 0
    num_bytes = bytes_of_request(specs)
    most = int(vllm_config.scheduler_config.max_num_seqs)
    return min(most, _most_bytes() // num_bytes) if num_bytes else 0


def _most_bytes() -> int:
    if not current_platform.is_cuda_alike():
        return KEPT_BYTES
    try:
        total = current_platform.get_device_total_memory()
    except Exception:  # Drivers of memory that CPU and GPU share raise errors of their own.
        return KEPT_BYTES
    return min(KEPT_BYTES, int(KEPT_SHARE * total))


def kept_bytes(vllm_config: Any, specs: Mapping[str, Any]) -> int:
    """What a rank's copies take."""
    return num_kept(vllm_config, specs) * bytes_of_request(specs)


def all_specs(kv_cache_config: Any) -> dict[str, Any]:
    """What the recurrent state of each layer is."""
    return {
        name: spec for _, specs in recurrent_groups(kv_cache_config) for name, spec in specs.items()
    }


def most_running(scheduler: SchedulerView) -> int:
    """Running requests beside which a step may be stopped."""
    specs = all_specs(scheduler.kv_cache_config)
    return num_kept(scheduler.vllm_config, specs) if specs else scheduler.max_num_active_reqs


def touched(scheduler: SchedulerView, num_scheduled_tokens: Mapping[str, int]) -> Rows:
    """Where a step that was just scheduled finds and leaves the state of its requests. A first
    chunk is left out: it reads none."""
    numbers = [number for number, _ in recurrent_groups(scheduler.kv_cache_config)]
    if not numbers:
        return {}
    continued = [
        scheduler.requests[name]
        for name, num_tokens in num_scheduled_tokens.items()
        if scheduler.requests[name].num_computed_tokens > num_tokens
    ]
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    return {
        number: [_row(managers[number], request) for request in continued] for number in numbers
    }


def _row(manager: Any, request: Any) -> int:
    blocks = manager.req_to_blocks[request.request_id]
    return int(blocks[(request.num_computed_tokens - 1) // manager.block_size].block_id)


def stranded(scheduler: SchedulerView, request: Any) -> bool:
    """Whether a stopped step has taken a state of the request's farther than its next step may
    reach: vLLM leaves a gap in the block table where states would lie that no step has written,
    and a shorter step would end in the gap."""
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    for number, _ in recurrent_groups(scheduler.kv_cache_config):
        manager = managers[number]
        num_whole = -(-request.num_computed_tokens // manager.block_size)
        if len(manager.req_to_blocks[request.request_id]) > num_whole + 1:
            return True
    return False


@dataclass(frozen=True)
class _Layer:
    group: int
    layer: Any
    """vLLM's; its `kv_cache` holds the states, [blocks, ...] each."""
    copies: tuple[torch.Tensor, ...]
    """[rows, ...] each"""


class KeptStates:
    """One rank's copies. `keep` and `put_back` queue work on the current stream, no more."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self._groups = dict(recurrent_groups(kv_cache_config))
        self._num_rows = num_kept(vllm_config, all_specs(kv_cache_config))
        self._layers: list[_Layer] = []
        self._rows: dict[int, torch.Tensor] = {}
        """Rows of the running step, on the device."""

    def register(self, layers: Mapping[str, Any]) -> list[Any]:
        """Make room for the copies, once vLLM has made the states; `layers` are its, by name.
        Returns the recurrent ones."""
        self._layers = [
            _Layer(number, layers[name], self._room(layers[name].kv_cache))
            for number, specs in self._groups.items()
            for name in specs
        ]
        return [one.layer for one in self._layers]

    def _room(self, states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(state.new_empty((self._num_rows, *state.shape[1:])) for state in states)

    def keep(self, rows: Rows) -> None:
        """Before a forward: copy these rows, as many as `num_kept` at most."""
        self._rows = {}
        for one in self._layers:
            if not rows.get(one.group):
                continue
            index = self._index(one, rows[one.group])
            for state, copy in zip(one.layer.kv_cache, one.copies, strict=True):
                torch.index_select(state, 0, index, out=copy[: len(index)])

    def _index(self, one: _Layer, rows: list[int]) -> torch.Tensor:
        if one.group not in self._rows:
            device = one.copies[0].device
            # Memory that is not pinned would have the host wait for the device.
            index = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
            self._rows[one.group] = index.to(device, non_blocking=True)
        return self._rows[one.group]

    def put_back(self) -> None:
        """Behind a forward that was stopped: all rows of the step are as `keep` found them."""
        for one in self._layers:
            index = self._rows.get(one.group)
            if index is None:
                continue
            for state, copy in zip(one.layer.kv_cache, one.copies, strict=True):
                state.index_copy_(0, index, copy[: len(index)])
