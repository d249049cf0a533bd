"""Everything worth measuring on one GPU, stage by stage, within a budget of time.

    python benchmarks/gpu/run.py --out out/gpu                       # all stages, 25 minutes
    python benchmarks/gpu/run.py --out out/gpu --stages steps,overhead,response
    python benchmarks/gpu/run.py --out out/tiny --tiny               # all stages on a CPU

Each stage writes its files at once; one whose files are there is not repeated, so the same command
goes on where it stopped. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from models import write_shape

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CASES = [
    ("v2", "async", True, "bfloat16"),
    ("v2", "async", True, "float32"),
    ("v2", "sync", True, "float32"),
    ("v1", "async", True, "float32"),
    ("v2", "async", False, "float32"),
    ("v1", "sync", False, "float32"),
    ("v1", "sync", True, "float32"),
    ("v2", "sync", False, "float32"),
    ("v1", "async", False, "float32"),
]
"""(runner, scheduling, CUDA graphs, data type) of same_output.py, the likeliest in service first.
In bfloat16, with vLLM's own choice of attention, sums depend on who shares a step: as many texts
must equal those given alone with stops as without."""
ENGINE_PARTS = ("steps", "belief", "overhead", "response", "copies")
LOAD_S = 120.0
"""A guess at the longest an engine takes to load, compile and capture graphs."""
ARMS = (
    "online-only",
    "fcfs",
    "conserve",
    "conserve-no-stop",
    "priority",
    "conserve-offline-only",
    "conserve-offline-only-recompute",
)
"""The last two: what copying KV to the host costs."""


@dataclass
class Run:
    """What was asked for, and what is left of it."""

    out: Path
    model: str
    tiny: bool
    deadline_s: float
    traces: list[str] = field(default_factory=list)
    engine_parts: list[str] = field(default_factory=list)
    """Of engine_probe.py, still to be measured."""
    notes: list[str] = field(default_factory=list)

    @property
    def left_s(self) -> float:
        return self.deadline_s - time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{self.left_s:5.0f} s left] {text}", flush=True)

    def model_folder(self) -> Path:
        dtype = "float32" if self.tiny else "bfloat16"
        return write_shape(self.model, self.out / "models" / self.model, dtype)

    def call(self, name: str, command: list[str], most_s: float) -> bool:
        """Run a command, its words into logs/NAME.log. Whether it ended well and in time."""
        log = self.out / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        limit_s = min(most_s, self.left_s)
        if limit_s < 5:
            self.notes.append(f"{name}: no time left")
            return False
        started = time.monotonic()
        with log.open("ab") as out:
            process = subprocess.Popen(
                command,
                env=os.environ | ({"OMP_NUM_THREADS": "1"} if self.tiny else {}),
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            ended = _wait(process, limit_s)
        if ended != 0:
            self.notes.append(f"{name}: {'over time' if ended is None else f'status {ended}'}")
        self.say(
            f"{name}: {'done' if ended == 0 else 'NOT done'} in {time.monotonic() - started:.0f} s"
        )
        return ended == 0


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """The status, or None where it was ended for being late, with its children."""
    try:
        return process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
        return None


def environment(run: Run) -> None:
    """What this was measured on."""
    path = run.out / "environment.json"
    if path.is_file():
        return
    from conserve.bench import machine

    found = {
        "started": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine.describe_machine(),
        "versions": machine.versions(),
        "model": run.model,
        "nvidia_smi": _nvidia_smi(),
    }
    path.write_text(json.dumps(found, indent=1) + "\n")


def _nvidia_smi() -> str:
    fields = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit,pcie.link.gen.max"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return "none"


def engine(run: Run) -> None:
    """All wanted parts of engine_probe.py whose files are missing, in one process: loading takes
    long."""
    missing = [part for part in run.engine_parts if not (run.out / f"{part}.json").is_file()]
    run.engine_parts = []
    if not missing:
        return
    most_s = min(run.left_s, 45.0 * len(missing) + LOAD_S if run.tiny else 420.0)
    command = [sys.executable, str(HERE / "engine_probe.py"), "--parts", ",".join(missing)]
    command += ["--model", str(run.model_folder()), "--out", str(run.out)]
    command += ["--seconds", str(round(0.8 * (most_s - LOAD_S)))]
    run.call("engine", [*command, *(["--tiny"] if run.tiny else [])], most_s)


def same_output(run: Run) -> None:
    folder = run.out / "same-output"
    folder.mkdir(exist_ok=True)
    for runner, scheduling, graphs, dtype in CASES:
        name = f"{runner}-{scheduling}-{'graphs' if graphs else 'eager'}-{dtype}"
        out = folder / f"{name}.json"
        if out.is_file() or (run.tiny and (graphs or not _can_run(runner))):
            continue
        command = [sys.executable, str(HERE / "same_output.py"), "--runner", runner]
        command += ["--scheduling", scheduling, *(["--graphs"] if graphs else [])]
        command += ["--dtype", dtype]
        run.call(f"same-output-{name}", [*command, "--out", str(out)], 120)


def _can_run(runner: str) -> bool:
    from importlib.util import find_spec

    return runner == "v1" or find_spec("triton") is not None


def arms(run: Run, scenario: str, names: tuple[str, ...]) -> None:
    """`conserve bench run`, which itself goes on where it stopped, one arm a call."""
    file = HERE / "scenarios" / f"{_variant(run, scenario)}.toml"
    traces = [word for word in run.traces if word.startswith(f"{scenario}=")]
    if scenario == "azure-conv" and not run.tiny and not traces:
        run.notes.append("azure-conv: give the trace with --trace azure-conv=PATH")
        return
    command = [sys.executable, "-c", "from conserve.cli.main import main; main()", "bench", "run"]
    command += [str(file), "--model", str(run.model_folder()), "--seeds", "1"]
    command += ["--out", str(run.out / scenario), "--server-arg=--load-format=dummy"]
    # These scenarios are made for GPUs.
    command += ["--scale", "1"]
    command += [] if run.tiny else [word for trace in traces for word in ("--trace", trace)]
    for arm in names[: 3 if run.tiny else None]:
        if not list((run.out / scenario / "records").glob(f"*/{arm}.seed-*.jsonl.gz")):
            run.call(f"{scenario}-{arm}", [*command, "--arms", arm], 200)


def _variant(run: Run, scenario: str) -> str:
    if run.tiny:
        return "tiny"
    return f"{scenario}-4k" if run.model == "llama-2-7b" else scenario


def decision(run: Run) -> None:
    out = run.out / "decision-time.json"
    if not out.is_file():
        script = str(ROOT / "benchmarks" / "decision_time.py")
        quick = ["--backlog", "1000", "--calls", "5", "--repeats", "2"] if run.tiny else []
        run.call("decision", [sys.executable, script, *quick, "--output", str(out)], 90)


STAGES: dict[str, Callable[[Run], None]] = {
    "environment": environment,
    **dict.fromkeys(ENGINE_PARTS, engine),
    "burst": lambda run: arms(run, "burst", ARMS),
    "same-output": same_output,
    "decision": decision,
    "gamma": lambda run: arms(run, "gamma", ARMS[:3]),
    "azure-conv": lambda run: arms(run, "azure-conv", ARMS[:3]),
}
"""In order of priority."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", default=",".join(STAGES), help="these only, with commas")
    parser.add_argument("--model", default="llama-3.1-8b", help="or llama-2-7b")
    parser.add_argument("--budget-s", type=float, default=1500.0)
    parser.add_argument("--trace", action="append", default=[], help="azure-conv=PATH")
    parser.add_argument("--tiny", action="store_true", help="a small random model, for a CPU")
    options = parser.parse_args()
    wanted = options.stages.split(",")
    if unknown := set(wanted) - set(STAGES):
        parser.error(f"no stage {', '.join(sorted(unknown))}; known are {', '.join(STAGES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(
        out=options.out.resolve(),
        model="tiny" if options.tiny else options.model,
        tiny=options.tiny,
        deadline_s=time.monotonic() + options.budget_s,
        engine_parts=[part for part in ENGINE_PARTS if part in wanted],
        traces=[_absolute(trace) for trace in options.trace],
    )
    for name, stage in STAGES.items():
        if name in wanted and run.left_s > 0:
            run.say(f"stage {name}")
            stage(run)
    for note in run.notes:
        run.say(note)
    return 1 if run.notes else 0


def _absolute(trace: str) -> str:
    name, _, path = trace.partition("=")
    return f"{name}={Path(path).resolve()}"


if __name__ == "__main__":
    sys.exit(main())
