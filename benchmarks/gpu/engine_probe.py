"""One engine in this process, its steps driven and timed one by one.

    python benchmarks/gpu/engine_probe.py --model FOLDER --out DIR --parts steps,overhead

Parts, each a file in DIR as soon as it is measured: steps, belief, overhead, response, copies.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import probe_belief
import probe_copies
import probe_steps
import probe_stops
from probe import Probe

PARTS: dict[str, tuple[float, Callable[[Probe], dict[str, Any]]]] = {
    "steps": (0.4, probe_steps.measure),
    "belief": (0.05, probe_belief.measure),
    "overhead": (0.25, probe_stops.overhead),
    "response": (0.2, probe_stops.response),
    "copies": (0.1, probe_copies.measure),
}
"""Part -> its share of the time, and what measures it."""


def build(model: str, *, tiny: bool) -> Any:
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    from vllm import LLM

    from conserve.engine.launch import vllm_arguments
    from conserve.engine.settings import EngineSettings

    size: dict[str, Any] = {"max_num_seqs": 16, "max_num_batched_tokens": 256, "max_model_len": 512}
    size |= {"kv_cache_memory_bytes": 1 << 26, "enforce_eager": True, "dtype": "float32"}
    if not tiny:
        config = json.loads((Path(model) / "config.json").read_text())
        longest = min(36864, config["max_position_embeddings"])
        size = {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "max_model_len": longest}
        size |= {"gpu_memory_utilization": 0.85}
    settings = EngineSettings(profile_seconds=0, checkpoint="off")
    return LLM(
        model, load_format="dummy", skip_tokenizer_init=True, **size, **vllm_arguments(settings)
    )


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
    for part in parts:
        share, measure = PARTS[part]
        probe = Probe(core, time.perf_counter() + options.seconds * share / whole, options.out)
        found = {"ready_s": round(ready_s, 1), "engine": probe.describe(), **measure(probe)}
        (options.out / f"{part}.json").write_text(json.dumps(found) + "\n")
        print(f"{part}: written", flush=True)
    core.shutdown()


if __name__ == "__main__":
    main()
