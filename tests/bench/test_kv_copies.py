"""What the report says of displacement and KV copies, from the counters of a server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conserve.bench.report.figures import figures_of
from conserve.bench.report.kv_copies import figures_of_copies
from conserve.bench.report.tables import KV_COPIES
from conserve.bench.report.write import write_report
from conserve.bench.store import ResultFolder, Run, RunKey

STORED = Path(__file__).with_name("stored")
START = {
    "conserve:displaced_requests_total": 2.0,
    "conserve:computed_tokens_total{class=offline}": 1000.0,
    "conserve:restored_tokens_total{source=memory}": 50.0,
}
END = {
    "conserve:displaced_requests_total": 12.0,
    "conserve:displaced_tokens_total": 8000.0,
    "conserve:displaced_covered_tokens_total": 7600.0,
    "conserve:computed_tokens_total{class=offline}": 41000.0,
    "conserve:computed_tokens_total{class=online}": 9000.0,
    "conserve:recomputed_tokens_total{class=offline}": 400.0,
    "conserve:recomputed_tokens_total{class=online}": 77.0,
    "conserve:restored_tokens_total{source=memory}": 7050.0,
    "conserve:restored_tokens_total{source=disk}": 600.0,
    "conserve:checkpointed_tokens_total": 30000.0,
    "conserve:copied_bytes_total{direction=store}": 600.0,
    "conserve:copied_bytes_total{direction=load}": 200.0,
    "conserve:copy_seconds_total{direction=store}": 2.0,
    "conserve:copy_seconds_total{direction=load}": 1.0,
    "conserve:copy_wait_seconds_sum": 0.05,
    "conserve:copy_wait_seconds_count": 9.0,
}


def run_with(start: dict[str, float], end: dict[str, float]) -> Run:
    return Run(RunKey("all", "conserve", 1), [], start, end, 100.0)


def test_figures_are_what_was_counted_in_the_window() -> None:
    assert figures_of_copies(run_with(START, END)) == {
        "displaced_requests": 10.0,
        "displaced_tokens": 8000.0,
        "covered_share": 0.95,
        "recomputed_tokens": 400.0,
        "recomputed_share": 0.01,
        "restored_tokens": 7600.0,
        "checkpointed_tokens": 30000.0,
        "copied_bytes": 600.0,
        "copied_bytes_per_s": 300.0,
        "copy_wait_s": 0.005,
    }


def test_every_column_has_its_figure() -> None:
    assert {column.name for column in KV_COPIES} == set(figures_of_copies(run_with(START, END)))


def test_without_checkpoints_there_is_no_share_to_speak_of() -> None:
    end = {"conserve:displaced_requests_total": 1.0, "conserve:displaced_tokens_total": 5.0}
    figures = figures_of_copies(run_with({}, end))
    assert (figures["covered_share"], figures["checkpointed_tokens"]) == (0.0, 0.0)
    assert figures["recomputed_share"] is None
    assert figures["copied_bytes_per_s"] is None


@pytest.mark.parametrize("end", [{}, {"conserve:displaced_requests_total": 2.0}])
def test_a_server_that_displaced_nobody_in_the_window_has_no_figures(
    end: dict[str, float],
) -> None:
    assert figures_of_copies(run_with(START, end)) == {}


def test_the_report_has_the_table_and_the_ratio(tmp_path: Path) -> None:
    """In a copy of the stored result, `conserve` counts displacement and another arm stands for
    the one that recomputes."""
    folder = tmp_path / "result"
    shutil.copytree(STORED, folder)
    description = (folder / "run.json").read_text()
    (folder / "run.json").write_text(description.replace('"fcfs"', '"conserve-recompute"'))
    for path in folder.glob("records/*/fcfs.*"):
        path.rename(path.with_name(path.name.replace("fcfs", "conserve-recompute")))
    for path in folder.glob("records/*/conserve.seed-*.json"):
        counters = json.loads(path.read_text())
        counters["start"] |= START
        counters["end"] |= END
        path.write_text(json.dumps(counters))
    (folder / "failures.json").unlink(missing_ok=True)
    write_report(folder)
    text = (folder / "report.md").read_text()
    assert "### Displacement and KV copies" in text
    assert "| conserve | 10 | 8000 | 95.0 | 400 | 1.00 | 7600 |" in text
    (point, *_) = figures_of(ResultFolder(folder)).points.values()
    assert "offline_tps_over_recompute" in point["conserve"]
    assert "offline_tps_over_recompute" not in point["conserve-recompute"]
