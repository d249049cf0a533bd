"""Tables in a terminal of any width: what one would copy or add up is never cut off."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest

from conserve.cli.batch_view import print_batch, print_batches
from conserve.cli.usage import print_usage

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
WIDTHS = [200, 100, 80, 60, 30]
ID = "batch_0123456789abcdef0123456789abcdef"
MODEL = "meta-llama/Llama-3.1-8B-Instruct"
BATCH = {
    "id": ID,
    "status": "in_progress",
    "created_at": 1_764_298_000,
    "request_counts": {"total": 50_000, "completed": 12_345, "failed": 10_678},
}
TOKENS = {
    "input_tokens": 1_731_022,
    "input_tokens_details": {"cached_tokens": 1_402_112},
    "output_tokens": 1_298_155,
}
DAY = {
    "date": "2026-11-27",
    "request_class": "online",
    "model": MODEL,
    "completed": 10_812,
    "failed": 10_003,
    "usage": TOKENS,
}


def on_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed from here on goes to a terminal of so many columns."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))


@pytest.mark.parametrize("columns", WIDTHS)
def test_ids_and_counts_of_batches_are_whole(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_terminal(columns, monkeypatch)
    print_batches([BATCH])
    heading, row = COLOUR.sub("", capsys.readouterr().out).splitlines()
    words = [ID, "in_progress", "12,345", "10,678", "50,000"]
    assert row.split()[:5] == words
    assert ("created" in heading) == (columns > 99)
    assert len(row) <= max(columns, 80)


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("owner", [{}, {"owner": "0123456789abcdef" * 4}])
def test_usage_is_whole(
    owner: dict[str, str],
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    on_terminal(columns, monkeypatch)
    print_usage([{**owner, **DAY}])
    heading, first, *rest = COLOUR.sub("", capsys.readouterr().out).splitlines()
    words = first.split()
    assert "…" not in heading + first
    assert words[0] == "2026-11-27"
    assert words[-5:] == ["10,812", "10,003", "1,731,022", "1,402,112", "1,298,155"]
    assert words[-6] + "".join(line.strip() for line in rest) == MODEL


@pytest.mark.parametrize("moment", [10**18, -(10**18), 1e300, float("nan"), float("inf")])
def test_a_time_that_no_calendar_has_is_shown(
    moment: float, capsys: pytest.CaptureFixture[str]
) -> None:
    batch: dict[str, Any] = {**BATCH, "created_at": moment, "expires_at": moment}
    print_batches([batch])
    print_batch(batch)
    assert capsys.readouterr().out.count(str(moment)) == 3


def test_a_time_that_is_not_told_is_not_made_up(capsys: pytest.CaptureFixture[str]) -> None:
    nothing = {"total": None, "completed": None, "failed": None}
    print_batches([{**BATCH, "created_at": None, "request_counts": nothing}])
    assert capsys.readouterr().out.splitlines()[1].split() == [ID, "in_progress", *"000", "-"]
