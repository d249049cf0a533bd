"""The wheel and the sdist of this tree, as they are read in the tests."""

from __future__ import annotations

import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "conserve"


@dataclass(frozen=True)
class Built:
    """Both files."""

    wheel: Path
    sdist: Path

    def wheel_files(self) -> dict[str, bytes]:
        """Contents by path."""
        with zipfile.ZipFile(self.wheel) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    def sdist_files(self) -> dict[str, int]:
        """Bytes of each file, by its path in the repository."""
        with tarfile.open(self.sdist) as archive:
            members = [member for member in archive.getmembers() if member.isfile()]
        return {member.name.partition("/")[2]: member.size for member in members}

    def metadata(self) -> bytes:
        found = self.wheel_files()
        (name,) = (name for name in found if name.endswith(".dist-info/METADATA"))
        return found[name]


def package_files() -> dict[str, bytes]:
    """What the tree's package is made of, by path as in a wheel."""
    files = [path for path in PACKAGE.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(PACKAGE.parent)): path.read_bytes()
        for path in files
        if "__pycache__" not in path.parts
    }
