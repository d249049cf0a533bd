"""What this engine can do: whether its steps can be stopped, and how often to look."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from conserve.core.looks import RESPONSE_S, LookCost
from conserve.engine.door import MambaSpec
from conserve.engine.kept_states import all_specs, num_kept
from conserve.engine.scheduler_view import SchedulerView
from conserve.engine.settings import EngineSettings
from conserve.engine.speculation import is_shown

Reasons = Iterator[tuple[bool, str]]
"""(whether it holds, what to say of it)"""


def why_not_stoppable(
    scheduler: SchedulerView, settings: EngineSettings, *, has_connector: bool
) -> str:
    """The reason why no step may be stopped between layers, or nothing if steps may be."""
    config = scheduler.vllm_config
    reasons = chain(
        _of_start(config, settings, has_connector),
        _of_model(scheduler),
        _of_state(scheduler),
        _of_recurrent_state(scheduler),
        _of_ranks(config),
    )
    return next((reason for holds, reason in reasons if holds), "")


def _of_start(config: Any, settings: EngineSettings, has_connector: bool) -> Reasons:
    """How the engine was started."""
    ours = str(config.parallel_config.worker_cls).startswith("conserve.")
    yield settings.stop == "off", "switched off (stop: off)"
    yield not has_connector, "no ConserveConnector is configured (use `conserve serve`)"
    yield not ours, "the worker class is not ours"


def _of_model(scheduler: SchedulerView) -> Reasons:
    """What a step of the model is: it must end in a token or a vector that can be left out."""
    config = scheduler.vllm_config
    yield scheduler.is_encoder_decoder, "encoder-decoder models are not covered"
    yield config.diffusion_config is not None, "a canvas is refined from step to step"
    yield config.ec_transfer_config is not None, "encoder output from elsewhere is not covered"
    yield config.aux_output_config.enabled, "auxiliary output is recorded step by step"


def _of_state(scheduler: SchedulerView) -> Reasons:
    """What a forward leaves to the next one, other than KV that is written again."""
    config, caches = scheduler.vllm_config, _caches(scheduler.kv_cache_config)
    yield (
        not all(_is_rewritten(one) or isinstance(one, MambaSpec) for one in caches),
        "a cache of this kind may not survive being written twice",
    )
    drafting = config.speculative_config
    if drafting is not None:
        yield not is_shown(drafting), f"stops beside drafts by {drafting.method} were not tried"
        counts = config.scheduler_config.async_scheduling and not config.use_v2_model_runner
        yield counts, "the runner counts the drafts of a stopped step as judged"
    yield config.engram_config is not None, "n-gram layers remember tokens beside the cache"
    yield _prefetches_weights(config.offload_config), "weights of the next layers are on their way"
    hisparse = config.attention_config.hisparse_config
    yield hisparse is not None, "pages move between host and device within a forward"
    one_kernel = getattr(config.kernel_config, "monokernel", False)  # from vLLM 0.33 on
    yield one_kernel, "one kernel runs whole layers, with buffers of its own"


def _of_recurrent_state(scheduler: SchedulerView) -> Reasons:
    """What of it is beside the rows that are copied (`kept_states`)."""
    specs = all_specs(scheduler.kv_cache_config)
    if not specs:
        return
    config = scheduler.vllm_config
    yield num_kept(config, specs) == 0, "the recurrent state of one request is too large to copy"
    beside = config.cache_config.use_replayssm or config.cache_config.use_kda_recoverssm
    yield beside, "recurrent state lies in rings beside its rows"
    drafted = any(spec.num_speculative_blocks for spec in specs.values())
    yield drafted, "recurrent state of drafts lies in blocks of its own"
    shared = scheduler.kv_cache_manager.coordinator.enable_partial_hash_hits
    yield shared, "states within a block are shared while they are written"


def _of_ranks(config: Any) -> Reasons:
    """What else must stop at the same layer, or moves weights behind the forward."""
    parallel = config.parallel_config
    yield parallel.pipeline_parallel_size > 1, "pipeline stages run different layers"
    yield parallel.nnodes > 1, "the stop flag reaches one host only"
    ray = parallel.distributed_executor_backend == "ray"
    yield ray, "Ray's workers may be on other hosts, and call the model runner themselves"
    yield waits_for_replicas(config), "layers of other replicas wait for those of this one"
    yield parallel.prefill_context_parallel_size > 1, "parts of one prompt on several ranks"
    yield parallel.use_ubatching, "two halves of a batch run in two threads"
    yield parallel.enable_eplb, "experts move from rank to rank, by what forwards have counted"
    yield parallel.enable_elastic_ep, "ranks of experts come and go"
    yield parallel.enable_fault_tolerance, "ranks that fail are replaced between steps"


def waits_for_replicas(vllm_config: Any) -> bool:
    """Whether every forward is one of all data-parallel replicas together, as experts that are
    spread over them make it: a step that some take and others do not waits for ever."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    return bool(parallel.data_parallel_size > 1 and model.is_moe)


def refuse_several_schedules(vllm_config: Any) -> None:
    """Raises ValueError where every rank is to make the same schedule by itself: ours depends on
    the clock, so ranks would run different steps and wait for each other for ever."""
    parallel = vllm_config.parallel_config
    if parallel.distributed_executor_backend == "external_launcher" and parallel.world_size > 1:
        raise ValueError(
            "distributed_executor_backend 'external_launcher' has every rank schedule by itself, "
            "and ConServe's schedules depend on each one's clock; use 'mp' or 'ray'"
        )


REWRITTEN = (
    "FullAttentionSpec",
    "MLAAttentionSpec",
    "SlidingWindowSpec",
    "ChunkedLocalAttentionSpec",
    "SinkFullAttentionSpec",
)
"""Kinds of KV cache where a position has a place of its own until its block is freed: a step that
runs again writes over what it wrote, and reads nothing that it wrote over."""


def _is_rewritten(cache: Any) -> bool:
    return type(cache).__name__ in REWRITTEN and cache.tokens_per_state == 1


def _caches(kv_cache_config: Any) -> Iterator[Any]:
    """What every layer's cache is, in vLLM's words."""
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        yield from getattr(spec, "kv_cache_specs", {"all": spec}).values()


def _prefetches_weights(offload: Any) -> bool:
    """As vLLM's `create_offloader` chooses. The buffers go round: a forward that is not run to
    its end leaves other layers' weights in them, for the next one to compute with."""
    if offload.offload_backend == "auto":
        return bool(offload.prefetch.offload_group_size > 0)
    return bool(offload.offload_backend == "prefetch")


def passes_safepoints(vllm_config: Any, grants: Mapping[str, int]) -> bool:
    """Whether a step of these grants (request -> tokens) looks at the flag at all: one that
    CUDA replays as a single full graph does not. Says no where a worker might do so."""
    config = vllm_config.compilation_config
    mode, largest = config.cudagraph_mode, config.max_cudagraph_capture_size
    if not mode or not largest or sum(grants.values()) > largest:
        return True
    all_decode = max(grants.values(), default=0) <= 1 + vllm_config.num_speculative_tokens
    runs = mode.decode_mode() if all_decode else mode.mixed_mode()
    return bool(runs.name != "FULL")


def num_layers(vllm_config: Any) -> int:
    """Of one rank's part of the model: it may look at the flag before each."""
    return int(vllm_config.model_config.get_num_layers(vllm_config.parallel_config))


def layers_between_safepoints(
    vllm_config: Any, settings: EngineSettings, predicted_s: float, look_cost: LookCost
) -> int:
    """Layers from one look at the flag to the next in the step that begins (`core.looks`)."""
    response_s = settings.stop_response_s or RESPONSE_S
    return look_cost.layers_between(predicted_s, num_layers(vllm_config), response_s=response_s)


def runs_workers_inside(vllm_config: Any) -> bool:
    """Whether the engine's own thread runs the forward: vLLM's default on one GPU."""
    return bool(vllm_config.parallel_config.distributed_executor_backend == "uni")
