"""The real scheduler without a model: configuration, requests, and vLLM's step loops."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from conserve.core.kv_groups import KVGroup
from conserve.engine.alarm import Alarm
from conserve.engine.launch import vllm_arguments
from conserve.engine.settings import EngineSettings
from conserve.engine.step_times import StepTimes

BLOCK_SIZE = 4
IDLE_S = 1e-3
"""vLLM's nap where it has requests and nothing to run."""
DRAFT = 7
"""Stands for any token: the pretend device knows by itself which drafts are right."""
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 8,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}


@dataclass
class FakeClock:
    """Time in seconds that moves only when told."""

    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


class HandAlarm(Alarm):
    """Rings when told: no thread waits for a clock that moves only when told."""

    at_s = math.inf

    def set(self, at_s: float) -> None:
        self.at_s = at_s

    def ring(self) -> None:
        self.at_s = math.inf
        self._ring()


def make_scheduler(
    folder: Path,
    *,
    num_blocks: int = 64,
    max_num_seqs: int = 8,
    max_step_tokens: int = 32,
    max_model_len: int = 512,
    async_scheduling: bool = False,
    chunked_prefill: bool = True,
    settings: EngineSettings | None = None,
    their_connector: dict[str, Any] | None = None,
    num_spec_tokens: int = 0,
    draft_model: bool = False,
    max_adapters: int | None = None,
    watermark: int = 0,
    canvas: int = 0,
    prefill_interval: int = 1,
    groups: Sequence[KVGroup] = (KVGroup(BLOCK_SIZE),),
) -> Any:
    """A ConserveScheduler over a tiny Llama's configuration, as `conserve serve` configures it.

    num_spec_tokens: drafts a request and step, by n-grams or by a draft model (the same).
    watermark: blocks that vLLM keeps free of requests that start while others run.
    canvas: tokens of a model's that writes by block diffusion.
    prefill_interval: steps between two that vLLM lets hold prompts, from 0.33 on.
    """
    from vllm.config.diffusion import DiffusionConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import init_none_hash, resolve_kv_cache_block_sizes
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from conserve.engine.scheduler import ConserveScheduler

    class Timed(ConserveScheduler):
        clock = wall_clock = FakeClock()
        make_alarm = HandAlarm

    model = TINY | {"max_position_embeddings": max_model_len}
    (folder / "config.json").write_text(json.dumps(model))
    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_step_tokens,
        block_size=groups[0].block_size if len(groups) == 1 else BLOCK_SIZE,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 20,
        # Of states that are kept once a request there is no prefix to be found.
        enable_prefix_caching=all(mamba_mode(group) != "none" for group in groups),
        speculative_config=_speculation(num_spec_tokens, folder if draft_model else None),
        enable_lora=max_adapters is not None,
        max_loras=max_adapters or 1,
        **vllm_arguments(settings or EngineSettings(profile_seconds=0), their_connector),
    ).create_engine_config()
    config.scheduler_config.async_scheduling = async_scheduling
    config.scheduler_config.prefill_schedule_interval = prefill_interval
    if canvas:
        config.diffusion_config = DiffusionConfig(canvas_length=canvas)
        vars(config.model_config)["is_diffusion"] = True  # vLLM looks it up once, and keeps it
    config.scheduler_config.watermark = (watermark + 0.5) / num_blocks if watermark else 0.0
    config.scheduler_config.enable_chunked_prefill = chunked_prefill
    config.cache_config.num_gpu_blocks = num_blocks
    config.cache_config.enable_prefix_caching &= bool(groups)  # as vLLM's where there is no KV
    if states := [group for group in groups if group.is_state]:
        config.cache_config.mamba_cache_mode = mamba_mode(states[0])
    cache = KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec([f"layers {g}"], spec_of(g)) for g in groups],
    )
    size, hash_tokens = resolve_kv_cache_block_sizes(cache, config)
    cache.hash_block_size = hash_tokens
    init_none_hash(sha256)
    # Where steps with drafts overlap, or of canvases, only Model Runner V2 may be stopped.
    needs_v2 = canvas or (async_scheduling and num_spec_tokens)
    v2 = {"VLLM_USE_V2_MODEL_RUNNER": "1"} if needs_v2 else {}
    with patch.dict(os.environ, v2):
        return Timed(
            vllm_config=config,
            kv_cache_config=cache,
            structured_output_manager=StructuredOutputManager(config),
            block_size=size,
            hash_block_size=hash_tokens,
            log_stats=True,
        )


def mamba_mode(group: KVGroup) -> str:
    """How vLLM keeps states in such a group: at the ends of blocks, or once a request, in a block
    of as many tokens as a request may have. "": it keeps none."""
    if not group.is_state:
        return ""
    return "none" if group.block_size == TINY["max_position_embeddings"] else "align"


def spec_of(group: KVGroup) -> Any:
    """vLLM's description of such layers. In every group a block has as many bytes."""
    import torch
    from vllm.v1 import kv_cache_interface as kinds

    if group.is_state:
        return kinds.MambaSpec(
            block_size=group.block_size,
            shapes=((128,),),
            dtypes=(torch.float32,),
            mamba_cache_mode=mamba_mode(group),
        )
    common: dict[str, Any] = {"block_size": group.block_size, "dtype": torch.float32}
    common |= {"num_kv_heads": 2, "head_size": 32 // group.block_size}
    if group.window is not None:
        return kinds.SlidingWindowSpec(sliding_window=group.window, **common)
    if group.chunk is not None:
        return kinds.ChunkedLocalAttentionSpec(attention_chunk_size=group.chunk, **common)
    return kinds.FullAttentionSpec(**common)


def _speculation(num_tokens: int, draft_model: Path | None) -> dict[str, Any] | None:
    if not num_tokens:
        return None
    if draft_model is not None:
        model = str(draft_model)
        return {"method": "draft_model", "model": model, "num_speculative_tokens": num_tokens}
    return {"method": "ngram", "num_speculative_tokens": num_tokens, "prompt_lookup_max": 3}


def make_request(
    name: str,
    prompt: list[int],
    num_output: int,
    *,
    online: bool,
    arrival_s: float,
    salt: str | None = None,
    adapter: int = 0,
    media: Sequence[tuple[str, int, int]] = (),
    extra_args: dict[str, Any] | None = None,
    hash_tokens: int = BLOCK_SIZE,
) -> Any:
    """`media`: (which, its first token, how many tokens) of each image in the prompt."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    return Request(
        name,
        prompt,
        SamplingParams(
            max_tokens=num_output, ignore_eos=True, temperature=0.0, extra_args=extra_args
        ),
        None,
        arrival_time=arrival_s,
        priority=0 if online else 1,
        cache_salt=salt,
        mm_features=[_image(*one) for one in media],
        lora_request=LoRARequest(f"adapter-{adapter}", adapter, "there") if adapter else None,
        block_hasher=get_request_block_hasher(hash_tokens, sha256),
    )


def _image(name: str, first: int, num_tokens: int) -> Any:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    return MultiModalFeatureSpec(None, "image", name, PlaceholderRange(first, num_tokens))


class InFlight(NamedTuple):
    """A step whose output has not been read."""

    output: Any
    record: Any
    times: StepTimes


@dataclass
class Engine:
    """vLLM's two step loops (`step`, `step_with_batch_queue`) around scheduler and device.

    The device works its steps off one after the other, and the clock shows the host's time. The
    worker is in the engine's own process, as it is by default on one GPU: in a step that may be
    stopped the host keeps close to the device, and comes back from it when it is over.

    `stop` decides for every stoppable step whether its forward is stopped; by default that is
    what the shared flag says.
    """

    scheduler: Any
    device: Any
    """A `Device`, or several that run each step together (`copies.Ranks`)."""
    step_s: float = 0.05
    stop: Callable[[int], bool] | None = None
    stop_layer: Callable[[], int] = lambda: 3
    """The layer at which a stopped step stops."""
    depth: int = 1
    outputs: dict[str, list[int]] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)
    num_stops: int = 0
    num_launched: int = 0
    prepare_s: float = 0.0
    """The host takes this long from a decision to the first layer."""
    tail_s: float = 0.0
    """What the device has still queued when the host comes back from a step that may be stopped."""
    _drafted: list[str] = field(default_factory=list)
    """Requests that drafts were made for last."""
    _queue: deque[Any] = field(default_factory=deque)
    """`InFlight`, oldest first."""
    _device_free_s: float = 0.0

    def add(self, request: Any) -> None:
        self.outputs[request.request_id] = []
        self.scheduler.add_request(request)

    def step(self) -> bool:
        """One turn of the loop; whether a forward ran or was waited for."""
        num_launched = self.num_launched
        waited = self.step_fn()
        if self.num_launched == num_launched and self.scheduler.has_requests():
            self.scheduler.clock.now_s += IDLE_S
        return waited

    def step_fn(self) -> bool:
        """As `EngineCore.step_fn`: without the nap."""
        if len(self._queue) < self.depth and self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self.num_launched += bool(output.total_num_scheduled_tokens)
            record = list(self.scheduler.driver.steps)[-1]
            self._queue.append(InFlight(output, record, self._dispatch(output, record)))
            goes_on = output.total_num_scheduled_tokens or self.scheduler.has_requests()
            if len(self._queue) < self.depth and goes_on:
                return True
        if not self._queue:
            return False
        flight = self._queue.popleft()
        self._finish(flight)
        return bool(flight.output.total_num_scheduled_tokens)

    def seconds(self, record: Any) -> float:
        """What the device takes for a step."""
        return self.step_s

    def _dispatch(self, output: Any, record: Any) -> StepTimes:
        """Queue a step. Its times are known here; nobody is told before its output is read."""
        clock = self.scheduler.clock
        if not output.total_num_scheduled_tokens:
            return StepTimes(clock.now_s, clock.now_s)
        clock.now_s += self.prepare_s
        launched_s = clock.now_s
        self._device_free_s = max(launched_s, self._device_free_s) + self.seconds(record)
        if record.plan.stoppable:
            clock.now_s = max(clock.now_s, self._device_free_s - self.tail_s)
        return StepTimes(launched_s, self._device_free_s)

    def _finish(self, flight: InFlight) -> None:
        output, record, times = flight
        stopped = False
        if record.plan.stoppable and output.total_num_scheduled_tokens:
            if self.stop is not None:
                stopped = self.stop(record.number)
            else:
                stopped = self.scheduler.stopper.flag.is_raised_for(record.number)
        self.num_stops += stopped
        result = self.device.run(output, stop_at=self.stop_layer() if stopped else None)
        result.step_times = times
        self.scheduler.clock.now_s = max(self.scheduler.clock.now_s, times.ended_s)
        outputs = self.scheduler.update_from_output(output, result)
        self._draft(output, stopped=stopped)
        for client in outputs.values():
            for one in client.outputs:
                self.outputs[one.request_id].extend(one.new_token_ids)
                if one.finish_reason is not None:
                    self.finished.add(one.request_id)

    def _draft(self, output: Any, *, stopped: bool) -> None:
        """What a draft model proposes, where the scheduler does not put placeholders instead. A
        worker that was stopped has what it proposed last, still."""
        from vllm.v1.outputs import DraftTokenIds

        num_tokens = self.scheduler.num_spec_tokens
        if not num_tokens or self.depth > 1:
            return
        if not stopped:
            self._drafted = list(output.num_scheduled_tokens)
        drafts = [[DRAFT] * num_tokens for _ in self._drafted]
        self.scheduler.update_draft_token_ids(DraftTokenIds(self._drafted, drafts))

    def run(self, most_steps: int = 5000) -> int:
        """Until nothing is left to do; raises AssertionError where that never comes."""
        for count in range(most_steps):
            if not self.scheduler.has_unfinished_requests() and not self._queue:
                return count
            self.step()
        raise AssertionError(f"{self.scheduler.get_num_unfinished_requests()} requests remain")
