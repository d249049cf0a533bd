"""An environment with the wheel, what the wheel declares, what that declares, and nothing else.

No index is asked: each file of a declared package is linked from the environment of the tests,
where it is in the version of the locks.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from email import message_from_string
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

from scripts.installed import normal


def declared(lines: list[str], extras: frozenset[str] = frozenset()) -> list[Requirement]:
    """Of Requires-Dist lines, those that hold here with these extras."""
    needs = [Requirement(line) for line in lines]
    return [
        need
        for need in needs
        if not need.marker or any(need.marker.evaluate({"extra": e}) for e in extras | {""})
    ]


def closure(needs: list[Requirement]) -> dict[str, Distribution]:
    """The packages that the requirements bring along, by name. Raises PackageNotFoundError for one
    that is not installed here."""
    found: dict[str, Distribution] = {}
    seen: set[str] = set()
    left = list(needs)
    while left:
        need = left.pop()
        if str(need) in seen:
            continue
        seen.add(str(need))
        package = distribution(need.name)
        found[normal(need.name)] = package
        left += declared(package.requires or [], frozenset(need.extras))
    return found


def link(package: Distribution, site: Path) -> None:
    """Every file of a package's own, where the other environment has it."""
    for path in package.files or []:
        if path.parts[0] == "..":
            continue
        target = site / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.symlink_to(Path(str(package.locate_file(path))).resolve())


def surroundings() -> dict[str, str]:
    """The environment's variables without those that lead elsewhere."""
    theirs = ("PYTHONPATH", "CONSERVE_URL", "OPENAI_API_KEY")
    return {name: value for name, value in os.environ.items() if name not in theirs}


@dataclass(frozen=True)
class Bare:
    """The environment's folder."""

    folder: Path

    @classmethod
    def with_wheel(cls, wheel: Path, folder: Path) -> Bare:
        venv.create(folder, with_pip=False)
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        site = folder / "lib" / version / "site-packages"
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
            metadata = message_from_string(archive.read(name).decode())
        for package in closure(declared(metadata.get_all("Requires-Dist", []))).values():
            link(package, site)
        bare = cls(folder)
        pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
        pip += ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
        subprocess.run(pip, check=True, env=surroundings())
        return bare

    def run(self, *words: str, cwd: Path, program: str = "conserve") -> tuple[int, str, str]:
        """Exit status, standard output and standard error."""
        done = subprocess.run(
            [str(self.folder / "bin" / program), *words],
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd,
            env={**surroundings(), "COLUMNS": "100"},
        )
        return done.returncode, done.stdout, done.stderr
