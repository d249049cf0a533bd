"""The start-up profile: a script of real steps, timed, and the latency model fitted to them."""

from __future__ import annotations

import math
import time
from typing import Any

from conserve.core.calibration import (
    CalibrationError,
    Recalibrator,
    fit,
    mean_relative_error,
    scaled,
)
from conserve.core.latency import StepShape
from conserve.engine import phases, profile_store
from conserve.engine.capabilities import waits_for_replicas
from conserve.engine.door import current_platform, init_logger
from conserve.engine.profile_bench import ProfileBench
from conserve.engine.profile_script import CPU_REACH, GPU_REACH
from conserve.engine.profile_store import Profile, UnreadableProfileError
from conserve.engine.steps import GENERIC_MODEL
from conserve.metrics.machine_targets import ChosenTargets
from conserve.metrics.processors import Taken, read_cpu_times, taken

logger = init_logger("vllm.conserve")

WORST_KEPT_ERROR = 0.1
"""Mean relative error above which a profile is not kept: a quiet machine's is half of it."""
MOST_KEPT_SHARE = 0.1
"""Share of the processors that others may have had while a profile that is kept was measured."""


def calibrate(engine_core: Any) -> None:
    """Load or measure the engine's latency model and hand it to its scheduler.

    Called once, after the engine is built and before it takes requests. Raises nothing: falls
    back to the generic model, with one log line, where nothing can be measured.
    """
    scheduler = engine_core.scheduler
    settings, config = scheduler.settings, scheduler.vllm_config
    path = profile_store.path_of(settings.profile_dir, config) if settings.profile_dir else None
    profile = _load(path) if path else None
    origin = f"from {path}"
    if profile is None and settings.profile_seconds > 0 and _may_run_steps(config):
        phases.begin(phases.PROFILING)
        started, before = time.monotonic(), read_cpu_times()
        profile = _measure(engine_core, settings.profile_seconds)
        seconds = time.monotonic() - started
        origin = f"measured in {seconds:.1f} s"
        if profile is not None and path is not None:
            origin += _keep(path, config, profile, taken(before, read_cpu_times(), seconds))
    if profile is None:
        logger.warning("ConServe: no latency profile; starting from a generic one")
    else:
        scheduler.experience.recalibrator = Recalibrator(profile.model, profile.mean_error)
        scheduler.promises.measured(profile.model)
        _report(scheduler, profile, origin)
    _say_targets(scheduler.promises.chosen)


def _may_run_steps(config: Any) -> bool:
    """How many there are depends on this process's clock: none where others would have to take
    as many. Those replicas learn while they serve."""
    if waits_for_replicas(config):
        logger.info("ConServe: no start-up profile: steps would wait for the other replicas")
        return False
    return not config.is_mm_encoder_only


def _load(path: Any) -> Profile | None:
    try:
        return profile_store.load(path)
    except UnreadableProfileError as error:
        logger.warning("ConServe: latency profile is rebuilt, since it cannot be read: %s", error)
        return None


def _keep(path: Any, config: Any, profile: Profile, disturbed: Taken) -> str:
    """Save a profile that is worth it; says so."""
    shared = current_platform.is_cpu() and disturbed.share > MOST_KEPT_SHARE
    if shared or profile.mean_error > WORST_KEPT_ERROR:
        logger.warning(
            "ConServe: the latency profile is not kept, and measured again at the next start: "
            "its mean error is %.0f %%, and others had %.0f %% of the processors meanwhile",
            100 * profile.mean_error,
            100 * disturbed.share,
        )
        return ""
    try:
        profile_store.save(path, config, profile)
    except OSError as error:
        logger.warning("ConServe: the latency profile is not kept: %s", error)
        return ""
    return f", kept in {path}"


def _report(scheduler: Any, profile: Profile, origin: str) -> None:
    model, targets = profile.model, scheduler.promises.targets
    logger.info(
        "ConServe: latency model with %.1f %% mean error (%s); 512 prompt tokens take %.0f ms",
        100 * profile.mean_error,
        origin,
        1000 * model.predict_prefill_s(512),
    )
    logger.info("ConServe: %s", _kv_space(scheduler))
    for name, least_s, target_s in (
        ("TBT", model.predict_s(StepShape(1, 0.0, 1, 128)), targets.tbt_s),
        ("TTFT", model.predict_prefill_s(128), targets.ttft_s),
    ):
        if least_s > target_s:
            logger.warning(
                "ConServe: the %s target of %.0f ms cannot be met even with an idle engine, "
                "which needs %.0f ms; offline work will starve unless --offline-floor is set. "
                "A target that could be met: --slo-%s-ms %d",
                name,
                1000 * target_s,
                1000 * least_s,
                name.lower(),
                _roomy_ms(least_s),
            )


def _kv_space(scheduler: Any) -> str:
    if not scheduler.kv_cache_config.kv_cache_groups:
        return "the model keeps no KV"
    num_tokens = scheduler.cache_config.num_gpu_blocks * scheduler.block_size
    return f"KV space for {num_tokens} tokens"


def _say_targets(chosen: ChosenTargets) -> None:
    targets = chosen.targets
    for name, seconds, reason in (
        ("TTFT", targets.ttft_s, chosen.ttft_reason),
        ("TBT", targets.tbt_s, chosen.tbt_reason),
    ):
        logger.info("ConServe: %s target %g ms, %s", name, 1000 * seconds, reason)


def _roomy_ms(least_s: float) -> int:
    """Twice the time, so that offline work finds slack; two digits of it, rounded up."""
    ms = 2000 * least_s
    unit = int(10 ** max(0, math.floor(math.log10(ms)) - 1))
    return math.ceil(ms / unit) * unit


def _measure(engine_core: Any, seconds: float) -> Profile | None:
    """Time steps for about `seconds`, and fit. None where no step can be timed, which is logged
    with its cause and ends nothing."""
    driver = engine_core.scheduler.driver
    bench = ProfileBench(engine_core, seconds)
    policy, driver.planner = driver.planner, bench.plan
    driver.keeper.checkpointer.hold_still = True
    try:
        bench.run(CPU_REACH if current_platform.is_cpu() else GPU_REACH)
    except Exception:  # whatever a model, a kernel or a worker raises
        logger.exception("ConServe: a step of the start-up profile failed")
        bench.abandon()
    finally:
        driver.planner = policy
        driver.keeper.checkpointer.hold_still = False
    _clear(bench)
    return _fit(bench)


def _clear(bench: ProfileBench) -> None:
    try:
        bench.clear()
    except Exception:  # an engine that cannot run an empty step says so to its first request too
        logger.exception("ConServe: the engine failed after the start-up profile")
        bench.abandon()
    bench.scheduler.reset_prefix_cache()
    bench.scheduler.driver.forget_history()


def _fit(bench: ProfileBench) -> Profile | None:
    samples = bench.samples
    if not samples:
        return None
    try:
        model = fit(samples)
    except CalibrationError as error:
        logger.warning("ConServe: the start-up profile is a rough one: %s", error)
        model = scaled(GENERIC_MODEL, samples)
    return Profile(model, mean_relative_error(model, samples), samples)
