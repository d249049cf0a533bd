"""The Grafana dashboard, as far as it can be checked without Grafana."""

from __future__ import annotations

import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.deployed import LEGEND, dashboard, dashboard_expressions, documented

KINDS = {"row", "stat", "timeseries"}
UNITS = {"s", "none", "percentunit"}


def test_it_is_a_dashboard_that_an_import_takes() -> None:
    board = dashboard()
    assert (board["uid"], board["title"]) == ("conserve", "ConServe")
    assert "id" not in board, "the Grafana that imports it gives the number"
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "instance"]
    assert variables["datasource"]["query"] == "prometheus"
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))


def test_panels_are_whole() -> None:
    for panel in dashboard()["panels"]:
        assert panel["type"] in KINDS
        assert panel["title"]
        if panel["type"] == "row":
            continue
        assert panel["description"].endswith("."), panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        letters = [target["refId"] for target in panel["targets"]]
        assert letters == [chr(ord("A") + n) for n in range(len(letters))]
        assert letters


def overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return all(
        one[at] < other[at] + other[size] and other[at] < one[at] + one[size]
        for at, size in (("x", "w"), ("y", "h"))
    )


def test_panels_lie_side_by_side() -> None:
    places = [panel["gridPos"] for panel in dashboard()["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    assert not [pair for pair in combinations(places, 2) if overlap(*pair)]
    assert overlap(places[1], places[1]), "the check can fail"


def test_every_expression_parses(promtool: str, tmp_path: Path) -> None:
    assert check(promtool, tmp_path, [each.text for each in dashboard_expressions()]) == 0
    assert check(promtool, tmp_path, ["sum(rate(conserve:steps_total[1m])"]) == 1


def check(promtool: str, folder: Path, texts: list[str]) -> int:
    rules: list[dict[str, Any]] = [
        {"record": f"panel:{n}", "expr": text} for n, text in enumerate(texts)
    ]
    path = folder / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    words = [promtool, "check", "rules", "--lint=none", str(path)]
    return subprocess.run(words, capture_output=True, check=False).returncode


def test_it_reads_documented_metrics_by_labels_it_has() -> None:
    for expression in dashboard_expressions():
        assert expression.names
        assert expression.names <= documented(), expression.where
        assert set(LEGEND.findall(expression.legend)) <= expression.labels, expression.where
