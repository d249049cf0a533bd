"""Numbers in documents come from result files; this repository's own are checked here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conserve.bench.arms import ARMS
from conserve.bench.report.publish import QUOTES, SCENARIOS, fill_documents, publish_result
from conserve.bench.store import ResultError, ResultFolder
from conserve.workload import Scenario
from conserve.workload.scenario import Offline, Online
from conserve.workload.sessions import Sessions

ROOT = Path(__file__).parents[2]
STORED = Path(__file__).with_name("stored")
QUOTE = "Before.\n<!-- bench:stored {quote} -->\nold\n<!-- /bench -->\nAfter.\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository whose README quotes the stored result."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(QUOTE.format(quote="headline"))
    return tmp_path


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """The stored result with the run that failed in it left out of the failures."""
    target = tmp_path / "measured"
    shutil.copytree(STORED, target)
    (target / "failures.json").unlink()
    (target / "logs").mkdir()
    (target / "logs" / "fcfs.seed-1.log").write_text("a path of this machine")
    return target


def test_no_number_in_our_documents_is_stale(tmp_path: Path) -> None:
    """In a copy of them, beside the results, there is nothing to fill in."""
    for part in ("docs", "benchmarks/results", str(SCENARIOS)):
        shutil.copytree(ROOT / part, tmp_path / part)
    shutil.copy(ROOT / "README.md", tmp_path)
    assert fill_documents(tmp_path) == []


def test_publishing_copies_the_result_and_fills_the_documents_in(root: Path, result: Path) -> None:
    publish_result(result, root)
    published = root / "benchmarks" / "results" / "stored"
    assert (published / "report.html").is_file()
    assert not (published / "logs").exists()
    assert len(list(ResultFolder(published).runs())) == len(list(ResultFolder(result).runs()))
    text = (root / "README.md").read_text()
    assert text.startswith("Before.\n<!-- bench:stored headline -->\n| arm |")
    assert text.endswith("<!-- /bench -->\nAfter.\n")
    assert "| conserve |" in text
    assert fill_documents(root) == []


def test_a_result_may_be_published_under_another_name(root: Path, result: Path) -> None:
    """Such as the same scenario on another machine."""
    (root / "README.md").write_text(QUOTE.format(quote="ratios").replace("stored", "stored-h100"))
    publish_result(result, root, "stored-h100")
    assert (root / "benchmarks" / "results" / "stored-h100" / "report.html").is_file()
    assert not (root / "benchmarks" / "results" / "stored").exists()
    assert "| fcfs |" in (root / "README.md").read_text()


@pytest.mark.parametrize("name", ["../elsewhere", "two words", "..", "a/b"])
def test_a_name_that_no_marker_could_hold_is_refused(root: Path, result: Path, name: str) -> None:
    with pytest.raises(ResultError, match="--name"):
        publish_result(result, root, name)
    assert not (root / "benchmarks").exists()


def test_a_changed_number_is_stale(root: Path, result: Path) -> None:
    publish_result(result, root)
    readme = root / "README.md"
    text = readme.read_text()
    digit = next(c for c in text.split("| conserve |")[1] if c.isdigit())
    before, after = text.split("| conserve |")
    changed = after.replace(digit, str((int(digit) + 1) % 10), 1)
    readme.write_text(f"{before}| conserve |{changed}")
    assert fill_documents(root) == [f"filled in {readme}"]
    assert readme.read_text() == text


@pytest.mark.parametrize("quote", sorted(QUOTES))
def test_every_quote_can_be_filled(root: Path, result: Path, quote: str) -> None:
    (root / "README.md").write_text("nothing")
    (root / "docs" / "page.md").write_text(QUOTE.format(quote=quote))
    done = publish_result(result, root)
    assert any("page.md" in line for line in done)


@pytest.mark.parametrize(
    ("quote", "figure"), [("copies", "displaced_requests"), ("stops", "num_stopped_steps")]
)
def test_arms_that_have_none_of_a_quotes_figures_are_left_out(
    root: Path, result: Path, quote: str, figure: str
) -> None:
    publish_result(result, root)
    file = root / "benchmarks" / "results" / "stored" / "figures.json"
    figures = json.loads(file.read_text())
    point = next(iter(figures["points"].values()))
    assert len(point) > 1
    point["conserve"][figure] = {"median": 12.0, "low": 11.0, "high": 13.0, "num_seeds": 3}
    file.write_text(json.dumps(figures))
    (root / "README.md").write_text(QUOTE.format(quote=quote))
    fill_documents(root)
    rows = [line for line in (root / "README.md").read_text().splitlines() if line.startswith("|")]
    assert rows[0].startswith("| arm |")
    assert rows[2:] == [row for row in rows if row.startswith("| conserve | 12")]
    assert len(rows) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- bench:nowhere headline --><!-- /bench -->", "neither a result nor a scenario"),
        ("<!-- bench:stored speed --><!-- /bench -->", "quotes are headline"),
        ("<!-- bench:stored:rate-9 ratios --><!-- /bench -->", "points are "),
    ],
)
def test_a_marker_that_names_nothing_is_refused(
    root: Path, result: Path, text: str, message: str
) -> None:
    (root / "README.md").write_text("nothing")
    publish_result(result, root)
    (root / "README.md").write_text(text)
    with pytest.raises(ResultError, match=message):
        fill_documents(root)


def test_a_result_with_failed_runs_is_not_published(root: Path) -> None:
    with pytest.raises(ResultError, match="fcfs at rate-1, seed 2 failed"):
        publish_result(STORED, root)
    assert not (root / "benchmarks").exists()


def test_a_scenario_without_a_result_says_so(root: Path, result: Path) -> None:
    scenarios = root / SCENARIOS
    scenarios.mkdir(parents=True)
    (scenarios / "stored.toml").write_text("")
    assert len(fill_documents(root)) == 1
    assert "Not measured yet." in (root / "README.md").read_text()
    assert fill_documents(root) == []
    publish_result(result, root)
    assert "Not measured yet." not in (root / "README.md").read_text()


def test_every_arm_scenario_and_key_is_in_the_docs() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    scenarios = [file.stem for file in (ROOT / SCENARIOS).glob("*.toml")]
    kinds = ["bursts", "opening", "phases", "gamma", "diurnal", "replay", "independent", "trace"]
    keys = [name for name in Scenario.model_fields if name not in ("name", "online", "offline")]
    keys += [f"offline.{name}" for name in Offline.model_fields]
    keys += [f"online.{name}" for name in Online.model_fields]
    keys += list(Sessions.model_fields)
    for word in [*ARMS, *scenarios, *kinds, *keys]:
        assert f"`{word}" in page, word
