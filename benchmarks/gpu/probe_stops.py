"""What safepoints cost a step that nobody stops, and how soon a stopped one is gone."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from random import Random
from typing import Any

import torch
from measured import percentiles
from probe import Probe

from conserve.core.looks import RESPONSE_S, LookCost

SIZES = (512, 2048, 8192)
NUM_PAIRS = 30
NUM_STOPS = 40


def sizes(probe: Probe) -> list[int]:
    fitting = [size for size in SIZES if size <= min(probe.most_tokens, probe.longest)]
    return fitting or [min(probe.most_tokens, probe.longest)]


def overhead(probe: Probe) -> dict[str, Any]:
    """The same prefill step, stoppable and not in turn; `every` is layers between safepoints."""
    found: list[dict[str, Any]] = []
    experience = probe.scheduler.experience
    learned, looks = experience.look_cost, (None, 1)
    until = _shares(probe, len(sizes(probe)) * len(looks))
    try:
        for size in sizes(probe):
            for every in looks:
                experience.look_cost = forced = Looks(every)
                found.append(_pairs(probe, size, forced, next(until)))
    finally:
        experience.look_cost = learned
    return {"pairs": found}


def _shares(probe: Probe, parts: int) -> Iterator[float]:
    """When each of so many parts is to be over."""
    started = time.perf_counter()
    share = max(0.0, probe.deadline_s - started) / parts
    return (started + share * (i + 1) for i in range(parts))


class Looks(LookCost):
    """Every so many layers; with None as the engine chooses that knows no look's cost yet."""

    def __init__(self, every: int | None) -> None:
        super().__init__()
        self.every = every
        self.used: int | None = None
        """In the step that began last; None before the first."""

    def layers_between(
        self, step_s: float, num_layers: int, *, response_s: float = RESPONSE_S
    ) -> int:
        chosen = super().layers_between(step_s, num_layers, response_s=response_s)
        self.used = self.every or chosen
        return self.used


def _pairs(probe: Probe, size: int, looks: Looks, until_s: float) -> dict[str, Any]:
    times: dict[bool, list[float]] = {False: [], True: []}
    for pair in range(NUM_PAIRS + 1):
        for stoppable in (True, False) if pair % 2 else (False, True):
            name = probe.add(size)
            _, seconds = probe.step({name: size}, stoppable=stoppable)
            assert probe.as_granted, "a step did not run as it was told"
            probe.drop([name])
            if pair:  # the first one warms up
                times[stoppable].append(seconds)
        if len(times[True]) >= 3 and time.perf_counter() > until_s:
            break
    ratios = [a / b - 1 for a, b in zip(times[True], times[False], strict=True)]
    return {
        "num_tokens": size,
        "every": looks.used,
        "chosen": looks.every is None,
        "plain_s": times[False],
        "watched_s": times[True],
        "median_overhead_ratio": statistics.median(ratios),
    }


def response(probe: Probe) -> dict[str, Any]:
    """Stops at random moments. unwound_s: flag raised to the step's end in the worker; idle_s: to
    the device having nothing left of it. Percentiles are by the tokens of the step."""
    rng = Random(1)
    ends = _watch_ends(probe)
    found: list[dict[str, Any]] = []
    until = _shares(probe, len(sizes(probe)))
    for size in sizes(probe):
        whole_s = _typical_s(probe, size)
        until_s = next(until)
        for _ in range(NUM_STOPS):
            if time.perf_counter() > until_s and found:
                break
            if stop := _stop_once(probe, size, rng.uniform(0.05, 0.85) * whole_s, ends):
                found.append({"step_s": whole_s, **stop})
    return {"stops": found, "unwound_ms": _by_size(found, "unwound_s"),
            "idle_ms": _by_size(found, "idle_s")}  # fmt: skip


def _watch_ends(probe: Probe) -> dict[str, float]:
    ends: dict[str, float] = {}
    unwinding = probe.worker_steps.unwinding
    assert unwinding is not None, "this engine stops no step"
    finish = unwinding.finish

    def watched() -> Any:
        ends["unwound"] = time.perf_counter()
        output = finish()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends["idle"] = time.perf_counter()
        return output

    unwinding.finish = watched  # type: ignore[method-assign]
    return ends


def _typical_s(probe: Probe, size: int) -> float:
    times: list[float] = []
    for _ in range(3):
        name = probe.add(size)
        times.append(probe.step({name: size})[1])
        probe.drop([name])
    return statistics.median(times)


def _stop_once(
    probe: Probe, size: int, after_s: float, ends: dict[str, float]
) -> dict[str, Any] | None:
    """One step asked to stop after so long; None where it was over by then."""
    name, raised = probe.add(size), []
    number = probe.scheduler.driver.steps.last_number + 1

    def stop() -> None:
        raised.append(time.perf_counter())
        probe.scheduler.stopper.flag.raise_for(number)

    ends.clear()
    timer = threading.Timer(after_s, stop)
    timer.start()
    probe.step({name: size}, stoppable=True)
    timer.cancel()
    timer.join()
    computed = probe.scheduler.requests[name].num_computed_tokens
    probe.drop([name])
    if not ends or not raised:
        return None
    return {
        "num_tokens": size,
        "after_s": after_s,
        "unwound_s": ends["unwound"] - raised[0],
        "idle_s": ends["idle"] - raised[0],
        "rolled_back": computed == 0,
    }


def _by_size(stops: list[dict[str, Any]], key: str) -> dict[str, dict[str, float]]:
    sizes = sorted({stop["num_tokens"] for stop in stops})
    return {
        str(size): percentiles([1000 * stop[key] for stop in stops if stop["num_tokens"] == size])
        for size in sizes
    }
