"""What compiling the default model costs at a start, and what it brings while serving.

    python benchmarks/compiled_speed.py

starts a server as it comes, then two that compile, of which the second finds what the first has
compiled and profiled, and writes benchmarks/results/compiled-speed.json: seconds until each is
ready, and tokens a second of one prompt, of one answer, and of 16 answers together. Takes five
minutes; keep the machine quiet.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from cpu_speed import serve, write

OUT = Path(__file__).parent / "results" / "compiled-speed.json"
CACHES = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR")
COMPILED = ["--no-enforce-eager"]
STARTS = {
    "eager, first start": ("eager", []),
    "eager, second start": ("eager", []),
    "compiled, first start": ("compiled", COMPILED),
    "compiled, second start": ("compiled", COMPILED),
}
"""Start -> whose profile and caches it finds, and its flags."""


def main() -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as kept:
        for name, (place, flags) in STARTS.items():
            folder = Path(kept) / place
            folder.mkdir(exist_ok=True)
            environment = {cache: str(folder / cache) for cache in CACHES}
            ready_s, speed = serve(flags, environment, folder)
            rows.append({"start": name, "ready_s": ready_s} | speed)
            print(json.dumps(rows[-1]))
    write(OUT, rows)


if __name__ == "__main__":
    main()
