"""Recurrent state: what of it a stoppable step touches is copied before, and put back when the step
is stopped."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, UniformTypeKVCacheSpecs
from vllm.v1.worker.gpu_worker import Worker as GPUWorker

from conserve.engine import gpu_worker, kept_states
from conserve.engine.gpu_worker import ConserveGPUWorker
from conserve.engine.kept_states import (
    KEPT_BYTES,
    KeptStates,
    bytes_of_request,
    kept_bytes,
    most_running,
    num_kept,
    stranded,
    touched,
)
from conserve.engine.settings import KEY, EngineSettings

pytestmark = pytest.mark.engine

NUM_BLOCKS = 12
CONV, SSM = (3, 8), (2, 4, 4)


def state_spec(*, block_size: int = 16, ssm: tuple[int, ...] = SSM) -> MambaSpec:
    return MambaSpec(
        block_size=block_size, shapes=(CONV, ssm), dtypes=(torch.bfloat16, torch.float32)
    )


def attention_spec() -> FullAttentionSpec:
    return FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)


def config_of(*specs: Any) -> Any:
    """A cache of these groups, two layers each; `number.layer` are their names."""
    return SimpleNamespace(
        kv_cache_groups=[
            SimpleNamespace(kv_cache_spec=spec, layer_names=[f"{number}.0", f"{number}.1"])
            for number, spec in enumerate(specs)
        ]
    )


def engine_of(*, max_num_seqs: int = 4, stop: str = "auto") -> Any:
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
        additional_config={KEY: EngineSettings(stop=stop).to_json_dict()},
    )


def states_of(chance: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Of one layer, as vLLM lays them out: slices of a page, which is larger."""
    pages = torch.randint(0, 256, (NUM_BLOCKS, 256), generator=chance, dtype=torch.uint8)
    conv = pages[:, :48].view(torch.bfloat16).view(-1, *CONV)
    ssm = torch.randn((NUM_BLOCKS, 40), generator=chance)[:, :32].view(-1, *SSM)
    return conv, ssm


@pytest.fixture
def layers() -> dict[str, Any]:
    chance = torch.Generator().manual_seed(0)
    return {
        name: SimpleNamespace(kv_cache=states_of(chance)) for name in ("0.0", "0.1", "2.0", "2.1")
    }


def bytes_in(layers: dict[str, Any]) -> list[torch.Tensor]:
    return [
        state.contiguous().view(torch.uint8).clone()
        for layer in layers.values()
        for state in layer.kv_cache
    ]


def overwrite(layers: dict[str, Any], rows: dict[int, list[int]]) -> None:
    """What the forward of a step does, as far as it comes."""
    for name, layer in layers.items():
        for state in layer.kv_cache:
            state[rows[int(name[0])]] = 1.5


def kept(layers: dict[str, Any]) -> KeptStates:
    states = KeptStates(engine_of(), config_of(state_spec(), attention_spec(), state_spec()))
    assert states.register(layers | {"1.0": None, "1.1": None}) == list(layers.values())
    return states


def test_what_a_stopped_step_wrote_is_put_back(layers: dict[str, Any]) -> None:
    states, before = kept(layers), bytes_in(layers)
    for rows in ({0: [3, 7], 2: [4, 1]}, {0: [7, 2, 5, 9], 2: [1, 8, 3, 6]}):
        states.keep(rows)
        overwrite(layers, rows)
        assert not all(map(torch.equal, bytes_in(layers), before))
        states.put_back()
        assert all(map(torch.equal, bytes_in(layers), before))


def test_a_later_step_forgets_the_rows_of_the_one_before(layers: dict[str, Any]) -> None:
    states = kept(layers)
    states.keep({0: [3], 2: [4]})
    overwrite(layers, {0: [3], 2: [4]})
    states.keep({0: [], 2: []})
    ran = bytes_in(layers)
    states.put_back()
    assert all(map(torch.equal, bytes_in(layers), ran)), "nothing was kept of a first chunk"


def test_copies_are_bounded() -> None:
    spec = state_spec()
    specs = {"0": spec, "1": spec, "full": attention_spec()}
    a_request = 2 * (2 * 24 + 4 * 32)
    assert bytes_of_request(specs) == a_request
    assert num_kept(engine_of(max_num_seqs=4), specs) == 4
    assert kept_bytes(engine_of(max_num_seqs=4), specs) == 4 * a_request
    large = {"0": state_spec(ssm=(KEPT_BYTES // 12, 1, 1))}
    assert num_kept(engine_of(), large) == 2
    assert num_kept(engine_of(), {"0": state_spec(ssm=(KEPT_BYTES, 1, 1))}) == 0
    assert num_kept(engine_of(), {"full": attention_spec()}) == 0
    assert kept_bytes(engine_of(stop="off"), specs) == 0, "nothing is put back"


@pytest.mark.parametrize(
    ("total_gib", "num_requests"), [(80, 511), (16, 127), (8, 63), (None, 511)]
)
def test_a_small_gpu_keeps_most_of_its_memory_for_kv(
    total_gib: int | None, num_requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def total_memory() -> int:
        if total_gib is None:
            raise RuntimeError("the driver does not say")
        return total_gib << 30

    gpu = SimpleNamespace(is_cuda_alike=lambda: True, get_device_total_memory=total_memory)
    monkeypatch.setattr(kept_states, "current_platform", gpu)
    specs = {"0": state_spec(ssm=(1 << 20, 1, 1))}
    assert num_kept(engine_of(max_num_seqs=1024), specs) == num_requests


def test_a_gpu_worker_leaves_room_for_the_copies_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    specs, said = {"0": state_spec()}, []
    worker: Any = object.__new__(ConserveGPUWorker)
    worker.vllm_config, worker.get_kv_cache_spec = engine_of(), lambda: specs
    monkeypatch.setattr(GPUWorker, "determine_available_memory", lambda self: 1 << 30)
    monkeypatch.setattr(gpu_worker.logger, "info", lambda text, *args: said.append(text % args))
    assert worker.determine_available_memory() == (1 << 30) - 4 * bytes_of_request(specs)
    assert "copies of recurrent state" in said.pop()
    worker.vllm_config = engine_of(stop="off")
    assert worker.determine_available_memory() == 1 << 30
    assert not said


def test_a_model_without_recurrent_layers_stops_beside_all_its_requests() -> None:
    scheduler = SimpleNamespace(
        kv_cache_config=config_of(attention_spec()), vllm_config=engine_of(), max_num_active_reqs=9
    )
    assert most_running(scheduler) == 9
    scheduler.kv_cache_config = config_of(state_spec(ssm=(KEPT_BYTES // 24, 1, 1)))
    assert most_running(scheduler) == 2, "two layers"


class Scheduler:
    """The part of vLLM's with block tables: a group of attention, one of recurrent layers."""

    def __init__(self, *specs: Any) -> None:
        self.kv_cache_config = config_of(*specs)
        self.requests: dict[str, Any] = {}
        managers = [SimpleNamespace(block_size=16, req_to_blocks={}) for _ in specs]
        coordinator = SimpleNamespace(single_type_managers=managers)
        self.kv_cache_manager = SimpleNamespace(coordinator=coordinator)

    def add(self, name: str, num_computed_tokens: int, *tables: list[int]) -> Any:
        request = SimpleNamespace(request_id=name, num_computed_tokens=num_computed_tokens)
        self.requests[name] = request
        managers = self.kv_cache_manager.coordinator.single_type_managers
        for manager, table in zip(managers, tables, strict=True):
            manager.req_to_blocks[name] = [SimpleNamespace(block_id=block) for block in table]
        return request


def test_the_rows_of_a_step_are_the_blocks_that_it_ends_in() -> None:
    scheduler: Any = Scheduler(attention_spec(), state_spec())
    scheduler.add("first chunk", 20, [1, 2], [0, 3])
    scheduler.add("decodes", 33, [4, 5, 6], [0, 0, 7])
    scheduler.add("ends a block", 32, [8, 9], [0, 10])
    grants = {"first chunk": 20, "decodes": 1, "ends a block": 12}
    assert touched(scheduler, grants) == {1: [7, 10]}


@pytest.mark.parametrize(
    ("num_computed_tokens", "table", "is_stranded"),
    [
        (0, [5], False),
        (0, [0, 5], True),
        (16, [4, 5], False),
        (16, [4, 0, 5], True),
        (20, [0, 4], False),
        (20, [0, 4, 5], False),
        (20, [0, 4, 0, 5], True),
    ],
)
def test_a_state_behind_a_gap_is_out_of_reach(
    num_computed_tokens: int, table: list[int], is_stranded: bool
) -> None:
    scheduler: Any = Scheduler(attention_spec(), state_spec())
    request = scheduler.add("a", num_computed_tokens, [1, 2, 3, 4], table)
    assert stranded(scheduler, request) is is_stranded


def test_layers_of_several_sizes_share_a_group() -> None:
    specs = {"0.0": state_spec(), "0.1": state_spec(ssm=(4, 4, 4))}
    group = object.__new__(UniformTypeKVCacheSpecs)
    object.__setattr__(group, "kv_cache_specs", specs)
    states = KeptStates(engine_of(), config_of(group))
    small, large = torch.zeros(NUM_BLOCKS, *SSM), torch.zeros(NUM_BLOCKS, 4, 4, 4)
    layers = {
        name: SimpleNamespace(kv_cache=(s,)) for name, s in zip(specs, (small, large), strict=True)
    }
    states.register(layers)
    states.keep({0: [2]})
    small[2], large[2] = 1.0, 1.0
    states.put_back()
    assert not small.any()
    assert not large.any()
