"""One engine in this process, its steps driven and timed one by one.

    python benchmarks/gpu/engine_probe.py --model FOLDER --out DIR --parts steps,overhead

Parts, each a file in DIR as soon as it is measured, in order of worth. On a CPU Model Runner V2 is
taken, in Triton's interpreter, where the `triton` package is on the path.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interpreter
import probe_belief
import probe_copies
import probe_steps
import probe_stops
from probe import Probe
from sizes import engine_arguments
from written import write_json

PARTS: dict[str, tuple[float, Callable[[Probe], dict[str, Any]]]] = {
    "response": (0.15, probe_stops.response),
    "overhead": (0.2, probe_stops.overhead),
    "steps": (0.35, probe_steps.measure),
    "belief": (0.05, probe_belief.measure),
    "copies": (0.25, probe_copies.measure),
}
"""Part -> its share of the time, and what measures it."""


def build(model: str, *, tiny: bool) -> Any:
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    if tiny and interpreter.is_there():
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
        interpreter.interpret_triton()
        interpreter.keep_async_on()
    from vllm import LLM

    from conserve.engine.launch import vllm_arguments
    from conserve.engine.settings import EngineSettings

    settings = EngineSettings(profile_seconds=0, checkpoint="off")
    sizes = engine_arguments(tiny=tiny)
    return LLM(model, skip_tokenizer_init=True, **sizes, **vllm_arguments(settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seconds", type=float, default=200.0, help="for all parts, once loaded")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    parts = options.parts.split(",")
    whole = sum(PARTS[part][0] for part in parts)
    started = time.monotonic()
    llm = build(options.model, tiny=options.tiny)
    core = llm.llm_engine.engine_core.engine_core
    ready_s = time.monotonic() - started
    # How far apart safepoints are depends on what the engine believes a step takes.
    probe_steps.learn(Probe(core, time.perf_counter() + options.seconds, options.out))
    for part in parts:
        share, measure = PARTS[part]
        probe = Probe(core, time.perf_counter() + options.seconds * share / whole, options.out)
        found = {"ready_s": round(ready_s, 1), "engine": probe.describe(), **measure(probe)}
        write_json(options.out / f"{part}.json", found)
        print(f"{part}: written", flush=True)
    core.shutdown()


if __name__ == "__main__":
    main()
