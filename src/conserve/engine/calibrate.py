"""The start-up profile: a script of real steps, timed, and the latency model fitted to them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from conserve.core.calibration import CalibrationError, Recalibrator, fit, mean_relative_error
from conserve.core.latency import LatencyModel, StepShape
from conserve.core.plan import Mode, Plan
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import Snapshot
from conserve.engine import profile_store
from conserve.engine.door import (
    Request,
    RequestStatus,
    SamplingParams,
    current_platform,
    init_logger,
)
from conserve.engine.profile_script import CPU_REACH, GPU_REACH, Point, script
from conserve.engine.profile_store import Profile, UnreadableProfileError

logger = init_logger("vllm.conserve")

WARM_UP_STEPS = 4
MOST_SAMPLES = 300
PREFIX = "conserve-profile-"


def calibrate(engine_core: Any) -> None:
    """Load or measure the engine's latency model and hand it to its scheduler.

    Called once, after the engine is built and before it takes requests. Falls back to the
    generic model, with one log line, where nothing can be measured.
    """
    scheduler = engine_core.scheduler
    settings, config = scheduler.settings, scheduler.vllm_config
    path = profile_store.path_of(settings.profile_dir, config) if settings.profile_dir else None
    profile = _load(path) if path else None
    origin = f"from {path}"
    generates = config.model_config.runner_type == "generate" and not config.is_mm_encoder_only
    if profile is None and settings.profile_seconds > 0 and generates:
        started = time.monotonic()
        profile = _measure(engine_core, settings.profile_seconds)
        origin = f"measured in {time.monotonic() - started:.1f} s"
        if profile is not None and path is not None:
            origin += _save(path, config, profile)
    if profile is None:
        logger.warning("ConServe: no latency profile; starting from a generic one")
        return
    scheduler.experience.recalibrator = Recalibrator(profile.model, profile.mean_error)
    _report(scheduler, profile, origin)


def _load(path: Any) -> Profile | None:
    try:
        return profile_store.load(path)
    except UnreadableProfileError as error:
        logger.warning("ConServe: latency profile is rebuilt, since it cannot be read: %s", error)
        return None


def _save(path: Any, config: Any, profile: Profile) -> str:
    try:
        profile_store.save(path, config, profile)
    except OSError as error:
        logger.warning("ConServe: the latency profile is not kept: %s", error)
        return ""
    return f", kept in {path}"


def _report(scheduler: Any, profile: Profile, origin: str) -> None:
    model, targets = profile.model, scheduler.settings.targets
    num_blocks = scheduler.cache_config.num_gpu_blocks
    logger.info(
        "ConServe: latency model with %.1f %% mean error (%s); 512 prompt tokens take %.0f ms",
        100 * profile.mean_error,
        origin,
        1000 * model.predict_prefill_s(512),
    )
    logger.info(
        "ConServe: TTFT target %.0f ms, TBT target %.0f ms; KV space for %d tokens; "
        "steps are%s stopped between layers",
        1000 * targets.ttft_s,
        1000 * targets.tbt_s,
        num_blocks * scheduler.block_size,
        "" if scheduler.can_stop else " not",
    )
    for name, least_s, target_s in (
        ("TBT", model.predict_s(StepShape(1, 0.0, 1, 128)), targets.tbt_s),
        ("TTFT", model.predict_prefill_s(128), targets.ttft_s),
    ):
        if least_s > target_s:
            logger.warning(
                "ConServe: the %s target of %.0f ms cannot be met even with an idle engine, "
                "which needs %.0f ms; offline work will starve unless --offline-floor is set",
                name,
                1000 * target_s,
                1000 * least_s,
            )


@dataclass
class _Bench:
    """Drives the engine with scripted plans and times each step."""

    engine_core: Any
    deadline_s: float
    samples: list[tuple[StepShape, float]] = field(default_factory=list)
    num_requests: int = 0
    grants: dict[str, int] = field(default_factory=dict)

    def plan(self, snapshot: Snapshot, model: LatencyModel, settings: PolicySettings) -> Plan:
        """Stands in for the policy: whatever was asked for."""
        return Plan(Mode.ONLINE_PREFILL, grants=dict(self.grants))

    def add(self, num_tokens: int) -> str:
        scheduler = self.engine_core.scheduler
        vocabulary = scheduler.vllm_config.model_config.get_vocab_size()
        self.num_requests += 1
        # Every prompt differs from its first block on, so none hits the prefix cache.
        first = self.num_requests * 7919
        prompt = [(first + 31 * i) % (vocabulary - 1) + 1 for i in range(num_tokens)]
        request = Request(
            f"{PREFIX}{self.num_requests}",
            prompt,
            SamplingParams(max_tokens=4096, ignore_eos=True, temperature=0.0),
            None,
            block_hasher=self.engine_core.request_block_hasher,
        )
        self.engine_core.add_request(request)
        return str(request.request_id)

    def step(self, grants: dict[str, int]) -> float:
        """Run one step to its end; its time in seconds. Under async scheduling an empty step
        may still be queued behind it."""
        scheduler = self.engine_core.scheduler
        number = scheduler._step_number + 1
        self.grants = grants
        started = time.perf_counter()
        self.engine_core.step_fn()
        self.grants = {}
        while any(record.number == number for record in scheduler._steps):
            self.engine_core.step_fn()
        return time.perf_counter() - started

    def clear(self) -> None:
        """Take every request of ours away, and let the workers know."""
        scheduler = self.engine_core.scheduler
        self.drop([name for name in scheduler.requests if name.startswith(PREFIX)])
        while scheduler.has_requests() or scheduler._steps:
            self.engine_core.step_fn()

    def time_step(self, grants: dict[str, int]) -> None:
        """A sample, unless the engine did not do just what it was granted: it may lack a slot
        or blocks, or end a request."""
        requests = self.engine_core.scheduler.requests
        shape, ends = StepShape(), {}
        for name, num_tokens in grants.items():
            context = requests[name].num_computed_tokens
            ends[name] = context + num_tokens
            if self.decodes(name):
                shape.add_decode(num_tokens, context)
            else:
                shape.add_prefill(num_tokens, context)
        seconds = self.step(grants)
        if all(
            name in requests and requests[name].num_computed_tokens == end
            for name, end in ends.items()
        ):
            self.samples.append((shape, seconds))

    def decodes(self, name: str) -> bool:
        """Whether a request of ours is there and has its first token out."""
        request = self.engine_core.scheduler.requests.get(name)
        return request is not None and request.num_output_tokens > 0

    def time_point(self, point: Point, resident: list[str]) -> None:
        new = [self.add(size) for size in point.prompts]
        grants = dict(zip(new, point.prompts, strict=True))
        decoding = [name for name in resident if self.decodes(name)]
        grants |= dict.fromkeys(decoding[: point.num_decodes], 1)
        if grants:
            self.time_step(grants)
        self.drop(new)

    def time_prompt(self, num_tokens: int, chunk: int) -> str:
        """Chunks of one prompt behind growing context; the request stays, as a decode."""
        name = self.add(num_tokens)
        for context in range(0, num_tokens, chunk):
            self.time_step({name: min(chunk, num_tokens - context)})
            if self.is_late:
                break
        return name

    @property
    def is_late(self) -> bool:
        return time.perf_counter() > self.deadline_s

    def drop(self, names: list[str]) -> None:
        self.engine_core.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)


def _measure(engine_core: Any, seconds: float) -> Profile | None:
    """Time steps for at most about `seconds`, and fit. None where nothing could be fitted."""
    scheduler = engine_core.scheduler
    bench = _Bench(engine_core, time.perf_counter() + seconds)
    policy, scheduler.planner = scheduler.planner, bench.plan
    try:
        _run(bench, scheduler)
        model = fit(bench.samples[WARM_UP_STEPS:])
    except CalibrationError as error:
        logger.warning("ConServe: the start-up profile is of no use: %s", error)
        return None
    finally:
        bench.clear()
        scheduler.planner = policy
        scheduler.reset_prefix_cache()
        scheduler.forget_history()
    samples = bench.samples[WARM_UP_STEPS:]
    return Profile(model, mean_relative_error(model, samples), samples)


def _run(bench: _Bench, scheduler: Any) -> None:
    reach = CPU_REACH if current_platform.is_cpu() else GPU_REACH
    most, num_slots = scheduler.max_num_scheduled_tokens, scheduler.max_num_running_reqs
    room = scheduler.cache_config.num_gpu_blocks * scheduler.block_size
    # The other half is for the tokens that residents will generate.
    longest = max(1, min(scheduler.max_model_len // 2, room // 2))
    for _ in range(WARM_UP_STEPS):
        bench.time_point(Point(prompts=(min(64, most, longest),)), [])
    resident = _residents(bench, min(reach.counts[-1], num_slots - 8, room // 1024), longest)
    if longest >= 1024 and len(resident) + 1 < num_slots:
        length, chunk = min(longest, reach.long_prompt), min(reach.long_chunk, most)
        resident.append(bench.time_prompt(length, chunk))
    for point in script(reach, min(most, longest), num_slots):
        if bench.is_late or len(bench.samples) > MOST_SAMPLES:
            return
        bench.time_point(point, resident)


def _residents(bench: _Bench, count: int, longest: int) -> list[str]:
    """Requests of several lengths that stay, to decode from; one slot stays free for prompts."""
    scheduler = bench.engine_core.scheduler
    names: list[str] = []
    for i in range(min(max(1, count), scheduler.max_num_running_reqs - 1)):
        if bench.is_late:
            break
        size = min((32, 64, 128, 256)[i % 4], longest)
        names.append(bench.time_prompt(size, scheduler.max_num_scheduled_tokens))
    return names
