"""How long a start takes until the first answer, and where the time goes: `conserve serve` on the
default model, its first start on a machine, and plain `vllm serve` on the same folder.

    python benchmarks/start_up.py [STARTS]

starts each of the three that many times (3 unless said), in turn, and writes
benchmarks/results/start-up.json: medians, every start, and the phases as the server's own log says
them. All get the same data type, KV space and threads. Keep the machine quiet; three minutes for
one start of each.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from conserve.batch.connection import client_for
from conserve.bench.arms import ARMS, DEFAULT
from conserve.bench.commands import server_command
from conserve.bench.machine import (
    describe_machine,
    probe_gflops,
    server_args,
    server_environment,
    versions,
)
from conserve.bench.ports import free_port
from conserve.bench.server import Server
from conserve.core.snapshot import Targets
from conserve.metrics.processors import read_cpu_times, taken
from conserve.server.start.default_model import NAME, default_model
from conserve.sim.arms import ONLINE_ONLY

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "start-up.json"
SAID = re.compile(r"ConServe at ([\d.]+) s: (.+)")
FIRST = "conserve serve, first start"
STARTS = {FIRST: DEFAULT, "conserve serve": DEFAULT, "vllm serve": ONLINE_ONLY}
"""What each is an arm of."""
TARGETS = Targets(ttft_s=1.25, tbt_s=0.25)


def main(words: Sequence[str]) -> None:
    times = int(words[0]) if words else 3
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in STARTS}
    with tempfile.TemporaryDirectory() as profiles:
        start(FIRST, Path(profiles) / "kept")  # unwritten caches are nobody's start
        for name in [each for _ in range(times) for each in STARTS]:
            folder = "kept" if name != FIRST else f"first-{len(rows[FIRST])}"
            rows[name].append(start(name, Path(profiles) / folder))
            print(json.dumps({"start": name} | rows[name][-1]), flush=True)
    told = {
        "machine": describe_machine(),
        "versions": versions(),
        "gflops": round(probe_gflops(), 1),
        "model": NAME,
        "starts": {name: summary(each) for name, each in rows.items()},
    }
    OUT.write_text(json.dumps(told, indent=1) + "\n")


def start(name: str, profiles: Path) -> dict[str, Any]:
    """Start a server, have one answer of it, and end it."""
    model, port = str(default_model()), free_port()
    arm = ARMS[STARTS[name]]
    with tempfile.TemporaryDirectory() as folder:
        args = server_args((), (), "bfloat16")
        command = server_command(arm, model, port, args, TARGETS, Path(folder))
        if arm.kind == "conserve":
            command += ["--profile-dir", str(profiles)]
        log, before, began_s = Path(folder) / "log", read_cpu_times(), time.monotonic()
        with Server(command, server_environment(model), port, log) as server:
            ready_s = server.wait_until_healthy()
            answer(server.base_url, model)
            answered_s = time.monotonic() - began_s
            others = taken(before, read_cpu_times(), answered_s).share
        return {
            "ready_s": round(ready_s, 1),
            "first_answer_s": round(answered_s, 1),
            "share_of_others": round(others, 2),
            "phases_s": dict(phases_in(log.read_text(errors="replace"))),
        }


def answer(url: str, model: str) -> None:
    body = {"model": model, "prompt": "Say hello.", "max_tokens": 1}
    with client_for(url, timeout=None) as http:
        http.post(f"{url}/v1/completions", json=body).raise_for_status()


def phases_in(log: str) -> Iterator[tuple[str, float]]:
    """Each phase that a start has told, and its seconds; the last line says when it was ready."""
    said = [(float(at_s), name) for at_s, name in SAID.findall(log)]
    for (began_s, name), (ended_s, _) in pairwise(said):
        yield name, round(ended_s - began_s, 1)


def summary(starts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians, and what they are of."""
    names = ("ready_s", "first_answer_s")
    medians = {name: statistics.median(each[name] for each in starts) for name in names}
    return {**medians, "each": list(starts)}


if __name__ == "__main__":
    main(sys.argv[1:])
