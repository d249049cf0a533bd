"""What is worth measuring on one GPU, in order of worth, within a budget of time.

    python benchmarks/gpu/run.py --out out/gpu --budget-s 570 --bundle out/results.tar.gz
    python benchmarks/gpu/run.py --out out/gpu --stages response,overhead,steps
    python benchmarks/gpu/run.py --out out/tiny --tiny               # on a CPU

Each stage has a limit of its own, writes its files at once, and is bundled when it ends; one whose
files are there is not repeated, so the same command goes on where it stopped. README.md beside this
file says which commands fit into fifteen minutes.
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
from importlib.util import find_spec
from pathlib import Path

import interpreter
from measured import is_answered
from models import write_shape
from written import bundle, write_json

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CASES = [
    ("v2", "async", True, "float32"),
    ("v2", "async", True, "bfloat16"),
    ("v2", "sync", True, "float32"),
    ("v1", "async", True, "float32"),
]
"""(runner, scheduling, CUDA graphs, data type) of same_output.py, the likeliest in service first.
In bfloat16, with vLLM's own choice of attention, sums depend on who shares a step: as many texts
must equal those given alone with stops as without."""
ENGINE_PARTS = ("response", "overhead", "steps", "belief", "copies")
START_S = 75.0
"""What of the engine parts' limit is left to the engine's start."""
LIMITS_S = {
    "environment": 20.0,
    "answers": 180.0,
    "same-output": 100.0,
    "engine": 215.0,
    "conserve": 140.0,
    "stock": 200.0,
    "gentle": 120.0,
}
"""The longest each may take, start of its engine or server included."""
ARMS = {
    "conserve": ("conserve",),
    "stock": ("online-only", "fcfs"),
    "gentle": ("conserve-gentle",),
}
"""Stage -> the arms of one server each."""


@dataclass
class Run:
    """What was asked for, and what is left of it."""

    out: Path
    tiny: bool
    deadline_s: float
    bundle: Path | None = None
    stretch: float = 1.0
    """Every limit is multiplied by it."""
    engine_parts: list[str] = field(default_factory=list)
    """Of engine_probe.py, still to be measured."""
    notes: list[str] = field(default_factory=list)
    took: dict[str, float] = field(default_factory=dict)
    """Seconds each program took."""

    @property
    def left_s(self) -> float:
        return self.deadline_s - time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{self.left_s:5.0f} s left] {text}", flush=True)

    @property
    def tiny_flag(self) -> list[str]:
        return ["--tiny"] if self.tiny else []

    def model_folder(self) -> str:
        name, dtype = ("tiny", "float32") if self.tiny else ("llama-3.1-8b", "bfloat16")
        return str(write_shape(name, self.out / "models" / name, dtype))

    def call(self, name: str, program: str, words: list[str], most_s: float) -> None:
        self.call_beside({name: [program, *words]}, most_s)

    def call_beside(self, programs: dict[str, list[str]], most_s: float) -> None:
        """Run programs beside one another, the words of each into logs/NAME.log, no longer than
        `most_s` or what is left."""
        limit_s = min(self.stretch * most_s, self.left_s)
        if limit_s < 5:
            self.notes += [f"{name}: no time left" for name in programs]
            return
        started_s = time.monotonic()
        running = {name: self._start(name, words) for name, words in programs.items()}
        for name, process in running.items():
            ended = _wait(process, started_s + limit_s)
            self.took[name] = round(time.monotonic() - started_s, 1)
            if ended != 0:
                self.notes.append(f"{name}: {'over time' if ended is None else f'status {ended}'}")
            self.say(f"{name}: {'done' if ended == 0 else 'NOT done'} in {self.took[name]:.0f} s")
        self._keep()

    def _start(self, name: str, words: list[str]) -> subprocess.Popen[bytes]:
        log = self.out / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            return subprocess.Popen(
                [sys.executable, str(HERE / words[0]), *words[1:]],
                env=self._environment(),
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        """What the caller has set stays."""
        chosen = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            # What the first start compiled and profiled, the next ones find.
            "VLLM_CACHE_ROOT": str(self.out / "cache" / "vllm"),
            "XDG_CACHE_HOME": str(self.out / "cache"),
        }
        if find_spec("flashinfer") is None:
            chosen["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
        if self.tiny:
            chosen["OMP_NUM_THREADS"] = "1"
        return chosen | os.environ

    def _keep(self) -> None:
        """Nothing that a program wrote is lost if this one is ended next."""
        took = self.out / "took.json"
        before = json.loads(took.read_text()) if took.is_file() else {}
        write_json(took, before | self.took)
        if self.bundle:
            bundle(self.out, self.bundle)


def _wait(process: subprocess.Popen[bytes], until_s: float) -> int | None:
    """The status, or None where it was ended for being late, with its children."""
    try:
        return process.wait(timeout=max(0.0, until_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            # A server that it started is given 20 s to end, and must not hold the GPU after that.
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
        "nvidia_smi": _nvidia_smi(),
        "flags": [Path(word).name if "/" in word else word for word in sys.argv[1:]],
    }
    write_json(path, found)


def _nvidia_smi() -> str:
    fields = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit,pcie.link.gen.max"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return "none"


def answers(run: Run) -> None:
    out = run.out / "answers.json"
    if not (out.is_file() and is_answered(json.loads(out.read_text()))):
        words = ["--model", run.model_folder(), "--out", str(out), *run.tiny_flag]
        run.call("answers", "answers.py", words, LIMITS_S["answers"])


def same_output(run: Run) -> None:
    """All cases beside one another: none of them is timed, and each needs little of a GPU."""
    folder = run.out / "same-output"
    folder.mkdir(exist_ok=True)
    programs = {}
    for runner, scheduling, graphs, dtype in _cases(run):
        name = f"{runner}-{scheduling}-{'graphs' if graphs else 'eager'}-{dtype}"
        if _shows_something(folder / f"{name}.json"):
            continue
        words = ["same_output.py", "--runner", runner, "--scheduling", scheduling]
        words += [*(["--graphs"] if graphs else []), *(["--rounds", "1"] if run.tiny else [])]
        words += ["--dtype", dtype, "--out", str(folder / f"{name}.json")]
        programs[f"same-output-{name}"] = words
    run.call_beside(programs, LIMITS_S["same-output"])


def _shows_something(file: Path) -> bool:
    """Whether the text of steps that were stopped has been compared."""
    return file.is_file() and bool(json.loads(file.read_text())["num_stops"])


def _cases(run: Run) -> list[tuple[str, str, bool, str]]:
    if not run.tiny:
        return CASES
    runner = "v2" if interpreter.is_there() else "v1"
    return [(runner, "async", False, "float32")]


def engine(run: Run) -> None:
    """All wanted parts of engine_probe.py whose files are missing, in one process: loading takes
    long. Those that failed before may fail again, and come last."""
    missing = [part for part in run.engine_parts if not (run.out / f"{part}.json").is_file()]
    missing.sort(key=lambda part: (run.out / f"{part}-failed.txt").is_file())
    run.engine_parts = []
    if not missing:
        return
    most_s = min(run.left_s / run.stretch, LIMITS_S["engine"])
    words = ["--parts", ",".join(missing), "--model", run.model_folder(), "--out", str(run.out)]
    words += ["--seconds", str(round(max(20.0, 0.9 * (most_s - START_S))))]
    words += ["--until-s", f"{time.monotonic() + run.stretch * most_s:.1f}", *run.tiny_flag]
    run.call("engine", "engine_probe.py", words, most_s)


def arms(run: Run, stage: str) -> None:
    """Some arms on every point of the load, on one server."""
    out, scenario = run.out / "load", HERE / "scenarios" / f"{'tiny' if run.tiny else 'load'}.toml"
    words = [str(scenario), "--arms", ",".join(ARMS[stage]), "--model", run.model_folder()]
    run.call(stage, "arms.py", [*words, "--out", str(out), *run.tiny_flag], LIMITS_S[stage])


STAGES: dict[str, Callable[[Run], None]] = {
    "environment": environment,
    "answers": answers,
    "same-output": same_output,
    **dict.fromkeys(ENGINE_PARTS, engine),
    "conserve": lambda run: arms(run, "conserve"),
    "stock": lambda run: arms(run, "stock"),
    "gentle": lambda run: arms(run, "gentle"),
}
"""In order of worth."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", default=",".join(STAGES), help="these only, with commas")
    parser.add_argument("--budget-s", type=float, default=900.0)
    parser.add_argument("--bundle", type=Path, help="all that was measured, after each stage anew")
    parser.add_argument("--stretch", type=float, default=1.0, help="multiplies every limit")
    parser.add_argument("--tiny", action="store_true", help="a small random model, for a CPU")
    options = parser.parse_args()
    wanted = options.stages.split(",")
    if unknown := set(wanted) - set(STAGES):
        parser.error(f"no stage {', '.join(sorted(unknown))}; known are {', '.join(STAGES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(
        out=options.out.resolve(),
        tiny=options.tiny,
        deadline_s=time.monotonic() + options.stretch * options.budget_s,
        stretch=options.stretch,
        bundle=options.bundle.resolve() if options.bundle else None,
        engine_parts=[part for part in ENGINE_PARTS if part in wanted],
    )
    for name, stage in STAGES.items():
        if name in wanted and run.left_s > 0:
            stage(run)
    for note in run.notes:
        run.say(note)
    return 1 if run.notes else 0


if __name__ == "__main__":
    sys.exit(main())
