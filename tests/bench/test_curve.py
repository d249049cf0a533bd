"""The curve: which points are on it, and the simulated one beside the measured one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conserve.bench.report.curve import SIMULATED, Curve, curves_of, draw_curves
from conserve.bench.report.figures import figures_of
from conserve.bench.report.write import write_report
from conserve.bench.store import ResultError, ResultFolder

STORED = Path(__file__).with_name("stored")
POINT = "rate-1"


@pytest.fixture
def swept(tmp_path: Path) -> Path:
    """The stored result, as if two more bounds had been measured: one harvests what the bound does,
    one what nobody does."""
    target = tmp_path / "result"
    shutil.copytree(STORED, target)
    for point in (target / "records").iterdir():
        for arm, source in (("conserve-gentle", "online-only"), ("conserve-greedy", "fcfs")):
            for ending in ("json", "jsonl.gz"):
                records = point / f"{source}.seed-1.{ending}"
                shutil.copyfile(records, point / f"{arm}.seed-1.{ending}")
    table = json.loads((target / "run.json").read_text())
    table["scenario"]["arms"] += ["conserve-gentle", "conserve-greedy"]
    (target / "run.json").write_text(json.dumps(table))
    return target


def curves(folder: Path) -> list[Curve]:
    result = ResultFolder(folder)
    return curves_of(result, figures_of(result), POINT)


def simulated_in(folder: Path) -> None:
    """As if the same had been simulated."""
    inner = folder / SIMULATED
    shutil.copytree(folder, inner, ignore=shutil.ignore_patterns(SIMULATED))
    table = json.loads((inner / "run.json").read_text())
    arms = {name: {"shows": arm["shows"]} for name, arm in table["arms"].items()}
    changed = {"machine": {"simulated": "a machine"}, "arms": arms, "versions": {}}
    (inner / "run.json").write_text(json.dumps({**table, **changed}))


def test_points_go_from_the_least_harvest_to_the_most(swept: Path) -> None:
    (curve,) = curves(swept)
    assert [point.name for point in curve.points] == ["gentle", "default", "greedy"]
    assert [point.is_default for point in curve.points] == [False, True, False]
    gentle, _, greedy = curve.points
    assert gentle.share.median == 0
    assert {spread.median for spread in gentle.slowdowns.values()} == {1.0}
    assert greedy.share.median == 1
    assert all(spread.median > 1 for spread in greedy.slowdowns.values())


def test_the_report_draws_it_with_the_simulated_one_beside_it(swept: Path) -> None:
    write_report(swept)
    alone = (swept / "curve.png").read_bytes()
    assert "(curve.png)" in (swept / "report.md").read_text()
    simulated_in(swept)
    assert [curve.simulated for curve in curves(swept)] == [False, True]
    write_report(swept)
    assert (swept / "curve.png").read_bytes() != alone


def test_what_was_simulated_has_a_report_of_its_own(swept: Path) -> None:
    simulated_in(swept)
    write_report(swept / SIMULATED)
    text = (swept / SIMULATED / "report.md").read_text()
    assert "a fresh engine for each arm and seed" in text
    (curve,) = curves(swept / SIMULATED)
    assert curve.simulated


def test_one_point_is_no_curve(tmp_path: Path) -> None:
    shutil.copytree(STORED, tmp_path / "result")
    assert [point.name for point in curves(tmp_path / "result")[0].points] == ["default"]
    assert not draw_curves(tmp_path / "curve.png", curves(tmp_path / "result"))
    assert not draw_curves(tmp_path / "curve.png", [])
    assert not (tmp_path / "curve.png").exists()


def test_a_simulated_folder_without_a_result_is_refused(swept: Path) -> None:
    (swept / SIMULATED).mkdir()
    with pytest.raises(ResultError, match=r"run\.json"):
        curves(swept)


def test_points_in_words(swept: Path) -> None:
    lines = list(curves(swept)[0].lines())
    assert lines[0].startswith("gentle: chat at TTFT P50 1.00x, TTFT P99 1.00x, TBT P50 1.00x")
    assert lines[0].endswith("of alone, offline 0% of first come first served")
