"""One engine in this process, its steps driven and timed one by one.

    python benchmarks/gpu/engine_probe.py --model FOLDER --out DIR --parts steps,overhead

Parts, each a file in DIR as soon as it is measured, in order of worth. One that fails leaves its
traceback in PART-failed.txt, and the others go on; the exit status is 1 then. On a CPU Model Runner
V2 is taken, in Triton's interpreter, where the `triton` package is on the path.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
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
SPARE_S = 10.0
"""What is left to the engine's end."""


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seconds", type=float, default=200.0, help="for all parts, once loaded")
    parser.add_argument(
        "--until-s",
        type=float,
        default=float("inf"),
        help="when this is ended from outside, by the machine's monotonic clock",
    )
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    started = time.monotonic()
    llm = build(options.model, tiny=options.tiny)
    core = llm.llm_engine.engine_core.engine_core
    ready_s = time.monotonic() - started
    seconds = min(options.seconds, options.until_s - time.monotonic() - SPARE_S)
    end_s = time.perf_counter() + seconds
    # How far apart safepoints are depends on what the engine believes a step takes.
    probe_steps.learn(Probe(core, end_s, options.out))
    failed = measure(core, options.parts.split(","), end_s, options.out, ready_s)
    core.shutdown()
    return 1 if failed else 0


def measure(core: Any, parts: list[str], end_s: float, folder: Path, ready_s: float) -> list[str]:
    """One part after another, each with its share of what is left until `end_s` of
    `time.perf_counter`. Returns those that failed."""
    failed = []
    for i, part in enumerate(parts):
        shares = [PARTS[one][0] for one in parts[i:]]
        now_s = time.perf_counter()
        probe = Probe(core, now_s + (end_s - now_s) * shares[0] / sum(shares), folder)
        if not _measure_one(part, probe, ready_s):
            failed.append(part)
    return failed


def _measure_one(part: str, probe: Probe, ready_s: float) -> bool:
    """Whether it did not fail."""
    failure = probe.folder / f"{part}-failed.txt"
    try:
        found = PARTS[part][1](probe)
    except Exception:
        failure.write_text(traceback.format_exc())
        print(f"{part}: FAILED, see {failure.name}", flush=True)
        probe.drop_all()
        return False
    engine = {"ready_s": round(ready_s, 1), "engine": probe.describe()}
    write_json(probe.folder / f"{part}.json", engine | found)
    failure.unlink(missing_ok=True)
    (probe.folder / f"{part}-unfinished.json").unlink(missing_ok=True)
    print(f"{part}: written", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
