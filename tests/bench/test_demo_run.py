"""The whole demo with a fake server: real processes, real sockets, no model."""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from conserve.bench import machine
from conserve.bench.demo import run as demo
from conserve.bench.demo.client import DemoError
from conserve.bench.demo.plan import DemoPlan, Wanted
from conserve.bench.demo.run import Subject, run_demo
from conserve.bench.scale import REFERENCE, Speed

FAKE = str(Path(__file__).with_name("token_server.py"))
LAPTOP = Speed(500.0, 20.0, 73.0)
WANTED = Wanted(alone_s=0.5, together_s=60.0)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Sequence[str]]]:
    """The flags of each server that was started."""
    monkeypatch.setattr(machine, "PROBE_S", 0.0)
    monkeypatch.setattr(demo, "DRAIN_S", 0.0)
    yield []
    # The demo cuts off what is on its way at the end. A request that was just connecting leaves
    # its socket to the collector (httpx's own library does), which is no other test's business.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def subject(model: Path, started: list[Sequence[str]], *words: str) -> Subject:
    def command(port: int, flags: Sequence[str]) -> list[str]:
        started.append(list(flags))
        return [sys.executable, FAKE, str(port), *words]

    return Subject("fake", str(model), command)


def as_fast_as(speed: Speed, monkeypatch: pytest.MonkeyPatch) -> None:
    async def measured(*_: object) -> Speed:
        return speed

    monkeypatch.setattr(demo, "speed_of", measured)


def test_the_machine_is_measured_on_the_server_that_both_periods_use(
    model: Path, tmp_path: Path, started: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = DemoPlan(alone_s=0.5, together_s=60.0, num_bursts=2, burst_size=2, num_documents=6)
    monkeypatch.setattr(demo, "plan_for", lambda speed, left_s, wanted: small)
    results = run_demo(subject(model, started), tmp_path / "out", WANTED)
    assert started == [[]]
    told = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert min(told["speed"].values()) > 0
    assert results.alone.num_chats == 4
    assert results.together.num_summaries == 6
    assert results.picture.is_file()


@pytest.mark.parametrize(("speed", "num_starts"), [(REFERENCE, 1), (LAPTOP, 2)])
def test_only_a_slower_machine_starts_again_with_targets_of_its_own(
    speed: Speed,
    num_starts: int,
    model: Path,
    tmp_path: Path,
    started: list[Sequence[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_fast_as(speed, monkeypatch)
    results = run_demo(subject(model, started), tmp_path / "out", WANTED)
    plan = results.conditions.plan
    own = ["--slo-ttft-ms", f"{1000 * plan.ttft_target_s:g}"]
    own += ["--slo-tbt-ms", f"{1000 * plan.tbt_target_s:g}"]
    assert started == [[], own][:num_starts]


def test_a_server_that_dies_shows_its_log(
    model: Path, tmp_path: Path, started: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_fast_as(REFERENCE, monkeypatch)
    with pytest.raises(DemoError, match="the server ended with status 3\\nthe fake server begins"):
        run_demo(subject(model, started, "60"), tmp_path / "out", WANTED)
