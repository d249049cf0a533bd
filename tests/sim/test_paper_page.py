"""Numbers in the documents are those of the stored figures, and no figure is missing."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    # The script's own folder comes first where it is run as a script.
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("sim_paper", ROOT / "benchmarks/sim_paper.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "benchmarks"))


def test_every_table_on_the_page_is_what_the_figures_give(script: ModuleType) -> None:
    figures = json.loads((script.RESULTS / "figures.json").read_text())
    tables = script.page.tables(figures)
    page = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
    found = dict(re.findall(r"<!-- table ([\w-]+) -->\n(.*?)\n<!-- end -->", page, re.DOTALL))
    assert set(found) == set(tables)
    for name, lines in tables.items():
        assert found[name] == "\n".join(lines), name


def test_the_step_times_on_the_page_are_those_of_the_profiles(script: ModuleType) -> None:
    figures = json.loads((script.RESULTS / "figures.json").read_text())
    assert figures["steps"] == script.published_steps()


def test_every_experiment_has_every_arm_of_its_scenario(script: ModuleType) -> None:
    figures = json.loads((script.RESULTS / "figures.json").read_text())
    for name in script.EXPERIMENTS:
        scenario = script.load_scenario(script.scenario_file(name))
        points = [point.name for point in scenario.points] or ["all"]
        assert list(figures[name]) == points
        for rows in figures[name].values():
            assert list(rows) == list(scenario.arms)


def test_the_fleet_figures_in_the_document_are_the_measured_ones() -> None:
    stored = json.loads((ROOT / "benchmarks/results/sim-fleet.json").read_text())
    text = (ROOT / "docs/simulator.md").read_text(encoding="utf-8")
    errors = " and ".join(f"{-error * 100:.1f} %" for error in stored["error"])
    assert f"the slots harvest {errors} less than the full simulation" in text
    assert f"{stored['day_of_1000_replicas_s']} s of processor time" in text
    assert f"after {stored['curve_s']} s for the curve, {stored['peak_memory_mb']} MB" in text


def test_the_speed_in_the_document_is_the_measured_one() -> None:
    stored = json.loads((ROOT / "benchmarks/results/sim-speed.json").read_text())
    text = (ROOT / "docs/simulator.md").read_text(encoding="utf-8")
    assert f"{stored['steps_a_minute']:,} policy steps a minute" in text
    assert f"{stored['least']:,} to {stored['most']:,}" in text
    assert f"at {stored['requests_a_step']} requests in a step" in text
    assert stored["steps_a_minute"] > 200_000, "the aim"


def test_the_validation_in_the_document_is_the_stored_one() -> None:
    text = (ROOT / "docs/simulator.md").read_text(encoding="utf-8")
    found = dict(re.findall(r"<!-- validation (\w+) -->\n(.*?)<!-- end -->", text, re.DOTALL))
    assert found
    for name, table in found.items():
        stored = ROOT / "benchmarks/results/sim-validation" / f"{name}.md"
        assert table == stored.read_text(encoding="utf-8")
