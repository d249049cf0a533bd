"""Why an engine's steps cannot be stopped, and how often a stoppable step looks at the flag."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.config.offload import OffloadConfig, PrefetchOffloadConfig, UVAOffloadConfig
from vllm.v1 import kv_cache_interface

from conserve.core.looks import LookCost
from conserve.engine.capabilities import (
    REWRITTEN,
    layers_between_safepoints,
    passes_safepoints,
    refuse_several_schedules,
    why_not_stoppable,
)
from conserve.engine.kept_states import KEPT_BYTES
from conserve.engine.launch import CPU_WORKER, GPU_WORKER
from conserve.engine.settings import EngineSettings
from conserve.engine.speculation import SHOWN

pytestmark = pytest.mark.engine


def scheduler(*, num_layers: int = 32, **changes: Any) -> Any:
    """An engine that can stop, but for the changes."""
    values = {
        "worker_cls": CPU_WORKER,
        "pipeline_parallel_size": 1,
        "tensor_parallel_size": 2,
        "nnodes": 1,
        "distributed_executor_backend": "mp",
        "max_num_seqs": 8,
        "additional_config": {},
        "use_replayssm": False,
        "use_kda_recoverssm": False,
        "enable_partial_hash_hits": False,
        "is_encoder_decoder": False,
        "speculative_config": None,
        "async_scheduling": True,
        "use_v2_model_runner": True,
        "data_parallel_size": 1,
        "is_moe": True,
        "use_ubatching": False,
        "ec_transfer_config": None,
        "enabled": False,
        "runner_type": "generate",
        "get_num_layers": lambda parallel: num_layers,
        "diffusion_config": None,
        "engram_config": None,
        "hisparse_config": None,
        "offload_config": OffloadConfig(),
        "prefill_context_parallel_size": 1,
        "enable_eplb": False,
        "enable_elastic_ep": False,
        "enable_fault_tolerance": False,
        "kv_cache_groups": [SimpleNamespace(kv_cache_spec=cache_of("FullAttentionSpec"))],
    } | changes
    part = SimpleNamespace(**values)
    part.parallel_config = part.model_config = part.vllm_config = part.aux_output_config = part
    part.attention_config = part.kernel_config = part.kv_cache_config = part
    part.cache_config = part.scheduler_config = part
    part.kv_cache_manager = SimpleNamespace(coordinator=part)
    return part


def cache_of(name: str, tokens_per_state: int = 1) -> Any:
    """A kind of KV cache of vLLM's, without its sizes."""
    spec = object.__new__(getattr(kv_cache_interface, name))
    if tokens_per_state != 1:
        object.__setattr__(spec, "tokens_per_state", tokens_per_state)
    return spec


def groups(*specs: Any) -> list[Any]:
    return [SimpleNamespace(kv_cache_spec=spec, layer_names=["a", "b"]) for spec in specs]


def recurrent(size: int = 64, **changes: Any) -> list[Any]:
    """A group of recurrent layers beside one of attention."""
    state = kv_cache_interface.MambaSpec(
        block_size=512, shapes=((size,),), dtypes=(torch.float32,), **changes
    )
    return groups(cache_of("FullAttentionSpec"), state)


def prefetching(**options: Any) -> OffloadConfig:
    return OffloadConfig(prefetch=PrefetchOffloadConfig(offload_group_size=8), **options)


def drafts_by(method: str) -> Any:
    return SimpleNamespace(method=method)


@pytest.mark.parametrize("v2", [True, False])
@pytest.mark.parametrize("method", SHOWN)
def test_drafts_do_not_stand_in_the_way(method: str, v2: bool) -> None:
    drafts = {"speculative_config": drafts_by(method), "use_v2_model_runner": v2}
    engine = scheduler(**drafts, async_scheduling=v2)
    assert why_not_stoppable(engine, EngineSettings(), has_connector=True) == ""


@pytest.mark.parametrize("worker", [CPU_WORKER, GPU_WORKER])
def test_what_conserve_serve_starts_can_stop(worker: str) -> None:
    engine = scheduler(worker_cls=worker)
    for stop in ("auto", "eager"):
        assert why_not_stoppable(engine, EngineSettings(stop=stop), has_connector=True) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "worker class is not ours"),
        ({"worker_cls": "auto"}, "worker class is not ours"),
        ({"pipeline_parallel_size": 2}, "pipeline stages"),
        ({"nnodes": 2}, "one host only"),
        ({"distributed_executor_backend": "ray"}, "Ray's workers"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"speculative_config": drafts_by("medusa")}, "drafts by medusa"),
        ({"speculative_config": drafts_by("dflash")}, "drafts by dflash"),
        (
            {"speculative_config": drafts_by("ngram"), "use_v2_model_runner": False},
            "drafts of a stopped step",
        ),
        ({"data_parallel_size": 2}, "other replicas"),
        ({"use_ubatching": True}, "two threads"),
        ({"ec_transfer_config": object()}, "encoder output"),
        ({"enabled": True}, "auxiliary output"),
        ({"diffusion_config": object()}, "canvas"),
        ({"engram_config": object()}, "n-gram layers"),
        ({"hisparse_config": object()}, "between host and device"),
        ({"monokernel": True}, "one kernel runs whole layers"),
        ({"offload_config": prefetching()}, "weights of the next layers"),
        ({"offload_config": prefetching(offload_backend="prefetch")}, "weights of the next layers"),
        ({"prefill_context_parallel_size": 2}, "several ranks"),
        ({"enable_eplb": True}, "experts move"),
        ({"enable_elastic_ep": True}, "come and go"),
        ({"enable_fault_tolerance": True}, "ranks that fail"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_each_obstacle_is_named(change: dict[str, Any], words: str) -> None:
    reason = why_not_stoppable(scheduler(**change), EngineSettings(), has_connector=True)
    assert words in reason


def test_weights_that_are_read_where_they_lie_leave_nothing_behind() -> None:
    uva = OffloadConfig(uva=UVAOffloadConfig(cpu_offload_gb=4))
    chosen = OffloadConfig(uva=uva.uva, offload_backend="uva")
    for offload in (uva, chosen):
        engine = scheduler(offload_config=offload)
        assert why_not_stoppable(engine, EngineSettings(), has_connector=True) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"kv_cache_groups": recurrent(KEPT_BYTES // 4)}, "too large to copy"),
        ({"kv_cache_groups": recurrent(num_speculative_blocks=2)}, "of drafts"),
        ({"use_replayssm": True}, "in rings"),
        ({"use_kda_recoverssm": True}, "in rings"),
        ({"enable_partial_hash_hits": True}, "are shared"),
    ],
    ids=["all", "large", "drafts", "replayed", "recovered", "shared"],
)
def test_recurrent_state_is_put_back_but_for_what_is_beside_it(
    change: dict[str, Any], words: str
) -> None:
    engine = scheduler(**{"kv_cache_groups": recurrent()} | change)
    reason = why_not_stoppable(engine, EngineSettings(), has_connector=True)
    assert words in reason
    assert bool(reason) is bool(words)


def test_every_kind_of_cache_is_one_that_may_be_written_twice_or_not() -> None:
    """By vLLM's own list. Rings and states beside the tokens do not survive it."""
    kinds = {
        name
        for name, kind in inspect.getmembers(kv_cache_interface, inspect.isclass)
        if issubclass(kind, kv_cache_interface.KVCacheSpec)
    }
    for name in kinds - {"UniformTypeKVCacheSpecs", "MambaSpec"}:
        engine = scheduler(kv_cache_groups=groups(cache_of("FullAttentionSpec"), cache_of(name)))
        reason = why_not_stoppable(engine, EngineSettings(), has_connector=True)
        assert (reason == "") is (name in REWRITTEN), name
    assert set(REWRITTEN) < kinds


def test_layers_of_a_common_group_are_each_looked_at() -> None:
    together = cache_of("UniformTypeKVCacheSpecs")
    layers = {"one": cache_of("MLAAttentionSpec"), "two": cache_of("MLAAttentionSpec", 4)}
    object.__setattr__(together, "kv_cache_specs", layers)
    engine = scheduler(kv_cache_groups=groups(together))
    reason = why_not_stoppable(engine, EngineSettings(), has_connector=True)
    assert "written twice" in reason, "several tokens make one state"
    layers.pop("two")
    assert why_not_stoppable(engine, EngineSettings(), has_connector=True) == ""


def test_ranks_that_schedule_by_themselves_are_refused() -> None:
    for backend, world_size, refused in (
        ("external_launcher", 2, True),
        ("external_launcher", 1, False),
        ("mp", 2, False),
        (None, 2, False),
    ):
        engine = scheduler(distributed_executor_backend=backend, world_size=world_size)
        context = pytest.raises(ValueError, match="'mp' or 'ray'") if refused else nullcontext()
        with context:
            refuse_several_schedules(engine.vllm_config)


def test_settings_and_the_missing_connector_are_named() -> None:
    engine = scheduler()
    off = EngineSettings(stop="off")
    assert "stop: off" in why_not_stoppable(engine, off, has_connector=True)
    assert "conserve serve" in why_not_stoppable(engine, EngineSettings(), has_connector=False)


def looks(predicted_s: float, num_layers: int = 32, **settings: Any) -> int:
    config = scheduler(num_layers=num_layers).vllm_config
    return layers_between_safepoints(config, EngineSettings(**settings), predicted_s, LookCost())


@pytest.mark.parametrize("predicted_s", [0.01, 0.3, 3.2, 32.0])
@pytest.mark.parametrize("response_s", [0.005, 0.1, 1.0])
def test_a_stop_answers_within_half_the_limit(predicted_s: float, response_s: float) -> None:
    """A layer can be under way when the flag goes up, so the other half is for that."""
    every = looks(predicted_s, stop_response_s=response_s)
    layer_s = predicted_s / 32
    assert every == 1 or every * layer_s <= response_s / 2 * (1 + 1e-9)
    assert 1 <= every <= 8, "at least four looks a step"


def test_short_steps_are_looked_at_less_often_than_long_ones() -> None:
    assert looks(0.1, stop_response_s=0.1) == 8
    assert looks(0.8, stop_response_s=0.1) == 2
    assert looks(8.0, stop_response_s=0.1) == 1


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_few_layers_are_all_looked_at(num_layers: int) -> None:
    assert looks(0.001, num_layers, stop_response_s=1.0) == 1
    assert looks(0.0, num_layers) == 1


@pytest.mark.parametrize(("predicted_s", "every"), [(0.016, 5), (0.16, 1)])
def test_by_default_a_stop_answers_within_5_ms(predicted_s: float, every: int) -> None:
    assert looks(predicted_s) == every


@pytest.mark.parametrize(
    ("mode", "decodes", "chunk"),
    [
        ("NONE", True, True),
        ("PIECEWISE", True, True),
        ("FULL", False, False),
        ("FULL_DECODE_ONLY", False, True),
        ("FULL_AND_PIECEWISE", False, True),
    ],
)
def test_a_step_that_replays_as_one_graph_passes_no_safepoint(
    mode: str, decodes: bool, chunk: bool
) -> None:
    from vllm.config import CUDAGraphMode

    compilation = SimpleNamespace(
        cudagraph_mode=CUDAGraphMode[mode], max_cudagraph_capture_size=512
    )
    config = SimpleNamespace(compilation_config=compilation, num_speculative_tokens=0)
    assert passes_safepoints(config, {"a": 1, "b": 1}) is decodes
    assert passes_safepoints(config, {"a": 4, "b": 4}) is chunk
    config.num_speculative_tokens = 3
    assert passes_safepoints(config, {"a": 4, "b": 4}) is decodes, "decodes with three drafts"
    assert passes_safepoints(config, {"a": 1, "b": 300}) is chunk
    assert passes_safepoints(config, {"a": 1, "b": 600}), "larger than any captured graph"
    compilation.max_cudagraph_capture_size = None
    assert passes_safepoints(config, {"a": 1})
