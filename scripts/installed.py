"""Which packages an environment has whole: a pip that was killed leaves half of one behind."""

import csv
import os
import re
import shutil
from importlib.metadata import Distribution
from pathlib import Path


def normal(name: str) -> str:
    """A package's name as the locks write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def records(package: Distribution) -> list[tuple[str, int | None]]:
    """The files of an installed package with their bytes: None where pip notes none, and for
    bytecode, which pip compiles anew where a package ships it."""
    rows = csv.reader((package.read_text("RECORD") or "").splitlines())
    return [
        (str(package.locate_file(name)), int(num) if num and not name.endswith(".pyc") else None)
        for name, _, num in rows
    ]


def is_whole(package: Distribution) -> bool:
    """Whether pip finished it: its last act is to write RECORD anew, with INSTALLER in it."""
    files = records(package)
    try:
        as_written = all(os.stat(name).st_size == num for name, num in files if num is not None)
    except OSError:
        return False
    return as_written and any(os.path.basename(name) == "INSTALLER" for name, _ in files)


def installed(site: Path) -> dict[str, Distribution]:
    """The whole packages in `site` by name. What a killed pip left of others is removed."""
    for leaving in site.glob("~*"):  # a package that pip was replacing
        shutil.rmtree(leaving) if leaving.is_dir() else leaving.unlink()
    found: dict[str, Distribution] = {}
    for folder in site.glob("*.dist-info"):
        package = Distribution.at(folder)
        if is_whole(package):
            found[normal(package.metadata["Name"])] = package
        else:
            shutil.rmtree(folder)
    return found
