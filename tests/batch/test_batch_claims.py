"""How much of a batch is in memory at once: lines are claimed by their bytes as by their number."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from conserve.batch import request_reader
from conserve.batch.lease_store import _within
from conserve.batch.outcome import offline_body
from conserve.batch.records import Line
from conserve.batch.settings import BatchSettings
from tests.batch.batch_fakes import FakeModel, eventually, running
from tests.batch.builders import jsonl, line

pytestmark = pytest.mark.anyio

LINE_BYTES = 4096


def padded(count: int, num_bytes: int = LINE_BYTES) -> bytes:
    """So many lines of about so many bytes."""
    return jsonl([line(f"long-{n}", f"{n} ".ljust(num_bytes - 200, "x")) for n in range(count)])


async def test_bytes_in_flight_are_bounded(tmp_path: Path) -> None:
    settings = BatchSettings(
        data_dir=tmp_path,
        poll_s=0.05,
        max_line_bytes=LINE_BYTES,
        max_in_flight_bytes=3 * LINE_BYTES,
    )
    model = FakeModel()
    model.open.clear()
    async with running(settings, model) as run:
        batch = await run.submit(padded(20))
        await eventually(lambda: model.running >= 3)
        model.open.set()
        batch = await run.until(batch.id, "completed")
        assert batch.request_counts.completed == 20
    assert model.most_running == 3


async def test_short_lines_do_not_wait_for_bytes(tmp_path: Path) -> None:
    settings = BatchSettings(
        data_dir=tmp_path, poll_s=0.05, max_line_bytes=1024, max_in_flight_bytes=1024 * 1024
    )
    model = FakeModel()
    model.open.clear()
    async with running(settings, model) as run:
        batch = await run.submit(padded(16, 300))
        await eventually(lambda: model.running == 16)
        model.open.set()
        await run.until(batch.id, "completed")


async def test_a_line_longer_than_the_budget_runs_alone(tmp_path: Path) -> None:
    settings = BatchSettings(data_dir=tmp_path, poll_s=0.05, max_in_flight_bytes=1024)
    model = FakeModel()
    async with running(settings, model) as run:
        batch = await run.until((await run.submit(padded(3))).id, "completed")
        assert batch.request_counts.completed == 3
    assert model.most_running == 1


async def test_lines_are_rewritten_off_the_loop(
    settings: BatchSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set()

    def noted(*words: Any) -> bytes:
        threads.add(threading.get_ident())
        return offline_body(*words)

    monkeypatch.setattr(request_reader, "offline_body", noted)
    async with running(settings) as run:
        await run.until((await run.submit(padded(3))).id, "completed")
    assert threads
    assert threading.get_ident() not in threads


@pytest.mark.parametrize(
    ("max_bytes", "numbers"), [(0, [1]), (9, [1]), (10, [1]), (29, [1]), (30, [1, 2]), (99, [1, 2])]
)
def test_a_claim_takes_the_first_that_fit_in_order(max_bytes: int, numbers: list[int]) -> None:
    lengths = {1: 10, 2: 20, 3: 70}
    found = [Line("batch_x", n, "", 0, length, 0) for n, length in lengths.items()]
    assert [each.line_no for each in _within(found, max_bytes)] == numbers
    assert _within([], max_bytes) == []
