"""The step times that the engine believes, beside those of the device itself.

Steps follow one another as when serving, two in flight under asynchronous scheduling: only then
does it show whether an output that is read late is taken for a step that was long or short.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from probe import Probe

from conserve.core.latency import LatencyModel
from conserve.core.learning import Experience, Lesson
from conserve.core.plan import Mode, Plan
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import RequestView, Snapshot
from conserve.metrics.percentiles import percentile

NUM_PROMPTS = 12
CHUNKS = (16, 64, 256, 1024, 4096)
"""Prompt tokens a step, in turn, beside whatever decodes."""
Elapsed = Callable[[], float]


def measure(probe: Probe) -> dict[str, Any]:
    """Pairs of (what the engine learned, what the device took), in seconds, and their ratios."""
    device = DeviceTimes(probe.worker.model_runner)
    believed = _watch(probe.scheduler.experience)
    planner, probe.scheduler.driver.planner = probe.scheduler.driver.planner, Chunks().plan
    length = min(2048, probe.longest // 2)
    names = [probe.add(length) for _ in range(NUM_PROMPTS)]
    try:
        while not probe.is_late and any(_is_prefill(probe, name) for name in names):
            probe.core.step_fn()
    finally:
        probe.drop(names)
        probe.scheduler.driver.planner = planner
        taken = device.end()
    pairs = list(zip(believed, taken, strict=False))
    ratios = [belief / seconds for belief, seconds in pairs if seconds > 0]
    return {
        "pairs": pairs,
        "num_steps": len(ratios),
        "median_ratio": percentile(ratios, 50),
        "p10_ratio": percentile(ratios, 10),
        "p90_ratio": percentile(ratios, 90),
    }


def _is_prefill(probe: Probe, name: str) -> bool:
    request = probe.scheduler.requests[name]
    return bool(request.num_computed_tokens < request.num_prompt_tokens)


class Chunks:
    """A policy: every decode, and a chunk of the first prompt that is not computed yet."""

    def __init__(self) -> None:
        self._sizes = deque(CHUNKS)

    def plan(self, snapshot: Snapshot, model: LatencyModel, settings: PolicySettings) -> Plan:
        grants = {r.request_id: 1 for r in snapshot.running if _num_left(r) == 1}
        prompts = (*snapshot.running, *snapshot.waiting_offline)
        prompt = next((r for r in prompts if _num_left(r) > 1), None)
        if prompt is not None and snapshot.num_free_slots >= (prompt not in snapshot.running):
            self._sizes.rotate(-1)
            room = snapshot.max_step_tokens - len(grants)
            grants[prompt.request_id] = min(self._sizes[0], _num_left(prompt), room)
        return Plan(Mode.OFFLINE if grants else Mode.IDLE, grants)


def _num_left(request: RequestView) -> int:
    return request.num_tokens - request.num_computed_tokens


def _watch(experience: Experience) -> list[float]:
    """What it learns of every step from here on, in seconds."""
    believed: list[float] = []
    ended = experience.ended

    @wraps(ended)
    def noted(*args: Any, **kwargs: Any) -> Lesson | None:
        lesson = ended(*args, **kwargs)
        if lesson is not None:
            believed.append(lesson.seconds)
        return lesson

    experience.ended = noted  # type: ignore[method-assign]
    return believed


class DeviceTimes:
    """From the first to the last of a step's work on the device, sampling included."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._seconds: list[Elapsed] = []
        execute, sample = runner.execute_model, runner.sample_tokens
        self._originals = execute, sample
        stop: list[Callable[[], Elapsed]] = []

        def execute_model(output: Any, *args: Any, **kwargs: Any) -> Any:
            if output.total_num_scheduled_tokens:
                stop.append(_started())
            return execute(output, *args, **kwargs)

        def sample_tokens(*args: Any, **kwargs: Any) -> Any:
            result = sample(*args, **kwargs)
            if stop:
                self._seconds.append(stop.pop()())
            return result

        runner.execute_model, runner.sample_tokens = execute_model, sample_tokens

    def end(self) -> list[float]:
        """Every step's, once the device has done them all."""
        self._runner.execute_model, self._runner.sample_tokens = self._originals
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return [seconds() for seconds in self._seconds]


def _started() -> Callable[[], Elapsed]:
    """Call what is returned at the end; what that returns says the seconds, once they are known."""
    if not torch.cuda.is_available():
        began_s = time.perf_counter()

        def ended_now() -> Elapsed:
            seconds = time.perf_counter() - began_s
            return lambda: seconds

        return ended_now
    first = torch.cuda.Event(enable_timing=True)
    first.record()

    def ended() -> Elapsed:
        last = torch.cuda.Event(enable_timing=True)
        last.record()
        return lambda: first.elapsed_time(last) / 1000

    return ended
