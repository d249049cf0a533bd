"""Step times over tokens and context, and the latency model and simulator profile they give."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

from probe import Probe

from conserve.core.calibration import CalibrationError, fit, mean_relative_error
from conserve.core.latency import NUM_FEATURES, StepShape

CHUNKS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
CONTEXTS = (0, 1024, 2048, 4096, 8192, 16384, 32768)
DECODE_CONTEXTS = (128, 1024, 4096)
DECODES = (1, 4, 16, 64, 128, 256)
REPEATS = 2
"""Of a sweep over all sizes, at least."""
HELD_OUT = 4
"""Every so many samples one is kept from the fit and tells its error."""
LEAST_SAMPLES = 4 * NUM_FEATURES
"""Three quarters of them are more than a fit needs."""

Sample = tuple[StepShape, float]


def learn(probe: Probe) -> None:
    """Let the engine know what steps take here, from a second or two of them."""
    samples: list[Sample] = []
    for _ in range(3):
        probe.drop([probe.prefill(min(64, probe.most_tokens))])
    _sweep(probe, samples, CONTEXTS[:2], (128,))
    if reason := _model(probe, samples).get("fit"):
        print(f"the engine believes what it did: {reason}", flush=True)


def measure(probe: Probe) -> dict[str, Any]:
    samples: list[Sample] = []
    _sweep(probe, samples, CONTEXTS, DECODE_CONTEXTS)
    rows = [
        [s.num_tokens, s.attention_pairs, s.num_decodes, s.decode_context, seconds]
        for s, seconds in samples
    ]
    return {"samples": rows, **_model(probe, samples)}


def _sweep(
    probe: Probe, samples: list[Sample], contexts: tuple[int, ...], decodes: tuple[int, ...]
) -> None:
    """Again where an engine is so small that most sizes do not fit into it."""
    num_sweeps = 0
    while (num_sweeps < REPEATS or len(samples) < LEAST_SAMPLES) and not probe.is_late:
        _prefills(probe, samples, contexts)
        _decodes(probe, samples, decodes)
        num_sweeps += 1


def _sample(probe: Probe, samples: list[Sample], grants: dict[str, int]) -> None:
    sample = probe.step(grants)
    if probe.as_granted:
        samples.append(sample)


def _prefills(probe: Probe, samples: list[Sample], contexts: tuple[int, ...]) -> None:
    """Chunks of every size, one after another from each context on."""
    for context in contexts:
        length = min(context + sum(CHUNKS), probe.longest)
        if context >= length or probe.is_late:
            return
        name, done = probe.prefill(length, upto=context), context
        for chunk in CHUNKS:
            if chunk <= probe.most_tokens and done + chunk <= length:
                _sample(probe, samples, {name: chunk})
                done += chunk
        probe.drop([name])


def _decodes(probe: Probe, samples: list[Sample], contexts: tuple[int, ...]) -> None:
    scheduler = probe.scheduler
    room = scheduler.cache_config.num_gpu_blocks * scheduler.block_size
    for context in contexts:
        residents: list[str] = []
        for count in DECODES:
            fits = count * (context + 64) < 0.9 * room and count < scheduler.max_num_running_reqs
            if context > probe.longest or not fits or probe.is_late:
                break
            while len(residents) < count and not probe.is_late:
                residents.append(probe.prefill(context))
            _sample(probe, samples, dict.fromkeys(residents, 1))
            if count > 1 and not probe.is_late:
                chunk = min(512, probe.most_tokens - count)
                name = probe.add(chunk)
                _sample(probe, samples, {**dict.fromkeys(residents, 1), name: chunk})
                probe.drop([name])
        probe.drop(residents)


def _model(probe: Probe, samples: list[Sample]) -> dict[str, Any]:
    told = [sample for i, sample in enumerate(samples) if i % HELD_OUT]
    kept = samples[::HELD_OUT]
    try:
        model = fit(told)
    except CalibrationError as error:
        return {"fit": str(error)}
    recalibrator = probe.scheduler.experience.recalibrator
    probe.scheduler.experience.recalibrator = type(recalibrator)(
        model, mean_relative_error(model, told)
    )
    return {
        "model": asdict(model),
        "machine": _machine(probe),
        "mean_error": mean_relative_error(model, told),
        "mean_error_held_out": mean_relative_error(model, kept),
        "median_step_s": statistics.median(seconds for _, seconds in samples),
    }


def _machine(probe: Probe) -> dict[str, int]:
    """Of the simulator's Machine, what an engine can tell of itself."""
    engine, config = probe.describe(), probe.scheduler.vllm_config.model_config
    kv_bytes = 2 * probe.num_layers * config.get_total_num_kv_heads() * config.get_head_size()
    return {
        "num_blocks": engine["num_blocks"],
        "block_size": engine["block_size"],
        "max_running": engine["max_num_seqs"],
        "max_step_tokens": engine["max_step_tokens"],
        "num_layers": engine["num_layers"],
        "kv_bytes_per_token": kv_bytes * config.dtype.itemsize,
    }
