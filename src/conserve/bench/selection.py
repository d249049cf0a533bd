"""What of a scenario is run: the arms, seeds and traces named on the command line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from conserve.bench.arms import arm_named
from conserve.workload import Scenario, ScenarioError, load_scenario, unknown_name

SCENARIOS = Path(str(files("conserve.workload") / "scenarios"))
"""Those that come with the package, one TOML file each."""


def scenario_file(name: str) -> Path:
    """A path as it is; a bare name from the package's scenarios. Raises ScenarioError."""
    if name.endswith(".toml"):
        return Path(name)
    file = SCENARIOS / f"{name}.toml"
    if not file.is_file():
        known = sorted(path.stem for path in SCENARIOS.glob("*.toml"))
        raise ScenarioError(unknown_name("scenario", name, known))
    return file


def chosen(file: Path, arms: str | None, seeds: str | None) -> Scenario:
    """The scenario of a file, narrowed, with arms that a server can run. Raises ScenarioError."""
    picked = narrowed(load_scenario(file), arms, seeds)
    for name in picked.arms:
        _check_arm(picked, name)
    return picked


def narrowed(scenario: Scenario, arms: str | None, seeds: str | None) -> Scenario:
    """The scenario with the arms and seeds given as lists with commas. Raises ScenarioError."""
    changes: dict[str, tuple[str, ...] | tuple[int, ...]] = {}
    if arms is not None:
        changes["arms"] = tuple(_words(arms, "--arms"))
    if seeds is not None:
        try:
            numbers = [int(word) for word in _words(seeds, "--seeds")]
            changes["seeds"] = tuple(dict.fromkeys(numbers))
        except ValueError as error:
            raise ScenarioError(f"--seeds: {seeds!r} is no list of integers like 1,2,3") from error
    return scenario.model_copy(update=changes)


def scale_named(text: str) -> float | None:
    """The number given with --scale; None for auto. Raises ScenarioError."""
    if text == "auto":
        return None
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0 < scale < math.inf:
        raise ScenarioError(f"--scale: {text!r} is neither auto nor a number above 0")
    return scale


def _check_arm(scenario: Scenario, name: str) -> None:
    arm = arm_named(name)
    sends_online = arm.online and scenario.online is not None
    if not sends_online and not (arm.offline and scenario.offline is not None):
        raise ScenarioError(f"{scenario.name}: arm {name!r} would be sent nothing")


def _words(text: str, flag: str) -> list[str]:
    """Each once."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ScenarioError(f"{flag}: names nothing")
    return list(dict.fromkeys(words))


def trace_paths(names: list[str], given: Sequence[str]) -> dict[str, Path]:
    """Paths by the names that a scenario or a plan uses, from `NAME=PATH`, or `PATH` where it uses
    one.

    Raises ScenarioError for a name it does not use, a missing one, or a file that is not there.
    """
    paths: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals:
            if len(names) != 1:
                raise ScenarioError(f"--trace {text}: say which with NAME=PATH; names: {names}")
            name, path = names[0], text
        if name not in names:
            raise ScenarioError(f"--trace: {unknown_name('trace', name, names)}")
        paths[name] = Path(path)
    for name in names:
        if name not in paths:
            raise ScenarioError(f"give the trace with --trace {name}=PATH")
        if not paths[name].is_file():
            raise ScenarioError(f"--trace {name}: no file {paths[name]}")
    return paths
