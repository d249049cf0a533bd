"""vLLM, ConServe and what both need, as a few parts for a GPU machine without a network.

    python benchmarks/gpu/pack.py out/kit --vllm WHEELS    # WHEELS: vLLM's wheels for that machine
    # copy out/kit there, at once or a part at a time; then on that machine
    python3 benchmarks/gpu/unpack.py out/kit /tmp/site && . /tmp/site/env.sh

Needs pip, and a package index where it runs. What `machine.txt` names is on the other machine: it
and what only it needs stay out. Our own requirements come in the versions of requirements/cpu.lock,
which suit vLLM 0.32, unless WHEELS has another.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

import sent
from parts import unpack_wheel, write_parts

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PIN = re.compile(r"[A-Za-z0-9._-]+==[^\s;+]+")
GLIBC = (5, 12, 17, 24, 26, 27, 28, 31, 34)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vllm", type=Path, help="a folder of wheels: vLLM's, and what it needs")
    parser.add_argument("--have", type=Path, default=HERE / "machine.txt", help="names, one a line")
    parser.add_argument("--python", default="3.12", help="of the other machine")
    parser.add_argument("--part-mib", type=float, default=44.0, help="of one part, at most")
    options = parser.parse_args()
    theirs = sorted(options.vllm.glob("*.whl")) if options.vllm else []
    have = names_in(options.have) | {name_of_wheel(wheel) for wheel in theirs}
    with tempfile.TemporaryDirectory() as scratch:
        found, site = Path(scratch, "wheels"), Path(scratch, "site")
        found.mkdir()
        download(wanted(have), found, options.python)
        ours = [*needed(found, have), build_ours(found)]
        for wheel in [*theirs, *ours]:
            unpack_wheel(wheel, site)
        print(
            "\n".join(f"  {wheel.stat().st_size / 2**20:6.2f} MiB {wheel.name}" for wheel in ours)
        )
        parts = write_parts(site, options.folder, int(options.part_mib * 2**20))
    sizes = ", ".join(f"{part.stat().st_size / 2**20:.1f}" for part in parts)
    print(f"{len(theirs)} wheels of vLLM's, {len(ours)} of ours; parts of {sizes} MiB")
    print(sent.told(sent.folder_sizes(ROOT), options.folder, sent.LIMIT_MIB)[0])


def names_in(file: Path) -> set[str]:
    lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    return {plain(line) for line in lines if line}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def name_of_wheel(wheel: Path) -> str:
    return plain(wheel.name.split("-")[0])


def split(requirement: str) -> tuple[str, frozenset[str]]:
    """A requirement's name and its extras."""
    match = re.match(r"([A-Za-z0-9._-]+)\s*(?:\[([^]]*)\])?", requirement.strip())
    assert match, requirement
    extras = (match[2] or "").split(",")
    return plain(match[1]), frozenset(extra.strip() for extra in extras if extra.strip())


def wanted(have: set[str]) -> list[str]:
    """Our own requirements that the other machine lacks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [need for need in project["dependencies"] if split(need)[0] not in have]


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


def download(requirements: list[str], folder: Path, python: str) -> None:
    if not requirements:
        return
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    target += [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC]
    target += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    pins = folder / "pins.txt"
    lines = (ROOT / "requirements" / "cpu.lock").read_text().splitlines()
    pins.write_text("\n".join(found[0] for line in lines if (found := PIN.match(line))))
    pip("download", *target, "--constraint", str(pins), "--dest", str(folder), *requirements)


def build_ours(folder: Path) -> Path:
    pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    (wheel,) = folder.glob("conserve_llm-*.whl")
    return wheel


def needed(folder: Path, have: set[str]) -> list[Path]:
    """Wheels reached from our own requirements without passing through what is there already."""
    wheels = {name_of_wheel(file): file for file in folder.glob("*.whl")}
    left = [split(need) for need in wanted(have)]
    kept: set[tuple[str, frozenset[str]]] = set()
    while left:
        need = left.pop()
        if need not in kept and need[0] not in have and need[0] in wheels:
            kept.add(need)
            left += needs(wheels[need[0]], need[1])
    return [wheels[name] for name in sorted({name for name, _ in kept})]


def needs(wheel: Path, extras: frozenset[str]) -> list[tuple[str, frozenset[str]]]:
    with ZipFile(wheel) as archive:
        (metadata,) = [
            name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)
        ]
        lines = HeaderParser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist")
    found = []
    for line in lines or []:
        condition = re.search(r"""extra\s*==\s*["']([^"']+)""", line)
        if condition is None or condition[1] in extras:
            found.append(split(line))
    return found


if __name__ == "__main__":
    main()
