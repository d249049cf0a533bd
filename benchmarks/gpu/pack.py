"""ConServe and what it needs besides vLLM and torch, as wheels for a machine without a network.

    python benchmarks/gpu/pack.py out/wheels --have numpy,matplotlib,tokenizers
    # copy the folder there, then on that machine, beside its own torch and vLLM:
    sh out/wheels/install.sh SITE && export PYTHONPATH=SITE

Needs pip, and a package index where it runs. `--have` names packages that the other machine has
already: they and what only they need stay out. vLLM and torch are never packed. Versions are those
of requirements/cpu.lock, which suit vLLM 0.32.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[2]
PIN = re.compile(r"[A-Za-z0-9._-]+==[^\s;+]+")
GLIBC = (5, 12, 17, 24, 26, 27, 28, 31, 34)
INSTALL = """#!/bin/sh
# Installs the wheels beside this file into the folder $1: export PYTHONPATH=$1 afterwards.
here=$(dirname "$0")
exec ${PYTHON:-python3} -m pip install --no-index --no-deps --upgrade --target "$1" "$here"/*.whl
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--have", default="", help="package names, with commas")
    parser.add_argument("--python", default="3.12", help="of the other machine")
    options = parser.parse_args()
    have = {_plain(name) for name in options.have.split(",") if name}
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch)
        _download(_wanted(have), found, options.python)
        wheels = _needed(found, have)
        _build_ours(found)
        for wheel in [*wheels, *found.glob("conserve_llm-*.whl")]:
            shutil.copy(wheel, options.folder)
    (options.folder / "install.sh").write_text(INSTALL)
    files = sorted(options.folder.glob("*.whl"))
    size = sum(file.stat().st_size for file in files) / 2**20
    print(f"{len(files)} wheels, {size:.1f} MiB in {options.folder}")


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _name_of(requirement: str) -> str:
    return _split(requirement)[0]


def _split(requirement: str) -> tuple[str, frozenset[str]]:
    """A requirement's name and its extras."""
    match = re.match(r"([A-Za-z0-9._-]+)\s*(?:\[([^]]*)\])?", requirement.strip())
    assert match, requirement
    extras = (match[2] or "").split(",")
    return _plain(match[1]), frozenset(extra.strip() for extra in extras if extra.strip())


def _wanted(have: set[str]) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [need for need in project["dependencies"] if _name_of(need) not in have]


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


def _download(wanted: list[str], folder: Path, python: str) -> None:
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    target += [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC]
    target += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    pins = folder / "pins.txt"
    lines = (ROOT / "requirements" / "cpu.lock").read_text().splitlines()
    pins.write_text("\n".join(found[0] for line in lines if (found := PIN.match(line))))
    _pip("download", *target, "--constraint", str(pins), "--dest", str(folder), *wanted)


def _build_ours(folder: Path) -> None:
    _pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))


def _needed(folder: Path, have: set[str]) -> list[Path]:
    """Wheels reached from our own requirements without passing through what is there already."""
    wheels = {_plain(file.name.split("-")[0]): file for file in folder.glob("*.whl")}
    left = [_split(need) for need in _wanted(have)]
    kept: set[tuple[str, frozenset[str]]] = set()
    while left:
        need = left.pop()
        if need not in kept and need[0] not in have and need[0] in wheels:
            kept.add(need)
            left += _needs(wheels[need[0]], need[1])
    return [wheels[name] for name in sorted({name for name, _ in kept})]


def _needs(wheel: Path, extras: frozenset[str]) -> list[tuple[str, frozenset[str]]]:
    with ZipFile(wheel) as archive:
        (metadata,) = [
            name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)
        ]
        lines = HeaderParser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist")
    found = []
    for line in lines or []:
        condition = re.search(r"""extra\s*==\s*["']([^"']+)""", line)
        if condition is None or condition[1] in extras:
            found.append(_split(line))
    return found


if __name__ == "__main__":
    main()
