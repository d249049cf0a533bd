"""How fast the default model is served in each data type, on this processor as it is and as one
with AVX2 only (`scripts/avx2_only`).

    python benchmarks/cpu_speed.py

starts a server for each of the four, measures it when nothing else is asked of it, and writes
benchmarks/results/cpu-speed.json: tokens a second of one prompt, of one answer, and of 16 answers
together. Takes five minutes; keep the machine quiet.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conserve.batch.connection import async_client_for
from conserve.bench.client import LoadClient
from conserve.bench.machine import describe_machine, probe_gflops
from conserve.bench.ports import free_port
from conserve.bench.prompts import body_of
from conserve.bench.scale import Speed
from conserve.bench.server import Server
from conserve.bench.speed import measure
from conserve.server.start.default_model import NAME, default_model

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "cpu-speed.json"
START = "from conserve.cli.main import main; main()"
MACHINES = {"as it is": {}, "AVX2 only": {"PYTHONPATH": str(ROOT / "scripts" / "avx2_only")}}
DTYPES = ("bfloat16", "float32")


def main() -> None:
    rows = []
    for machine, environment in MACHINES.items():
        for dtype in DTYPES:
            with tempfile.TemporaryDirectory() as folder:
                _, speed = serve(["--dtype", dtype], environment, Path(folder))
            rows.append({"processor": machine, "dtype": dtype} | speed)
            print(json.dumps(rows[-1]))
    write(OUT, rows)


def serve(
    flags: list[str], environment: dict[str, str], folder: Path
) -> tuple[float, dict[str, float]]:
    """Seconds until a server is ready, and tokens a second of it; `folder` keeps its profile."""
    port = free_port()
    own = ("--no-batches", "--no-dashboard", "--host", "127.0.0.1", "--port", str(port))
    command = [sys.executable, "-c", START, "serve", *flags, *own, "--profile-dir", str(folder)]
    with Server(command, environment, port, folder / "log") as server:
        ready_s = server.wait_until_healthy()
        speed = asdict(asyncio.run(ask(server.base_url)))
    return round(ready_s, 1), {name: round(tps, 1) for name, tps in speed.items()}


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    told = {
        "machine": describe_machine(),
        "gflops": round(probe_gflops(), 1),
        "model": NAME,
        "rows": rows,
    }
    file.write_text(json.dumps(told, indent=1) + "\n")


async def ask(url: str) -> Speed:
    async with async_client_for(url, base_url=url, timeout=None) as http:
        return await measure(LoadClient(http, body_of(str(default_model()), NAME, "speed")))


if __name__ == "__main__":
    main()
