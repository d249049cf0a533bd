"""What a start says it is at, without a server."""

from __future__ import annotations

import argparse
import json
import re
import socket
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from conserve.engine import phases
from conserve.server.start import address, progress
from conserve.server.start.progress import Progress
from conserve.server.start.progress_line import ERASE, LogLines, TerminalLine, line_for

BEGAN_S = 100.0
LONGEST_UNCOVERED = len("(EngineCore pid=1) INFO 11-27 17:40:18 [core.py:133] ")
"""What vLLM puts before a line of its log, at the shortest."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where phases are told, with nothing in it yet."""
    file = tmp_path / "phases"
    file.touch()
    monkeypatch.setenv(phases.PLACE, str(file))
    return file


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that `begin` reads; a test moves it."""
    now = [BEGAN_S]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def told_at(clock: list[float], *times: tuple[float, str]) -> None:
    for at_s, phase in times:
        clock[0] = BEGAN_S + at_s
        phases.begin(phase)


class TestPhases:
    def test_the_first_rank_counts(self, place: Path, clock: list[float]) -> None:
        told_at(clock, (1, phases.LOADING), (2, phases.WARMING_UP), (3, phases.LOADING))
        assert list(phases.begun(place)) == [(phases.LOADING, 101.0), (phases.WARMING_UP, 102.0)]

    def test_a_line_that_is_being_written_is_left_for_later(self, place: Path) -> None:
        place.write_text("101.0 loading the model\n102.0 warm")
        assert list(phases.begun(place)) == [("loading the model", 101.0)]

    def test_nobody_asks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(phases.PLACE, raising=False)
        phases.begin(phases.LOADING)
        assert not phases.are_told()

    def test_who_asked_has_gone(self, place: Path) -> None:
        place.unlink()
        place.parent.rmdir()
        phases.begin(phases.LOADING)
        assert not place.parent.exists()

    @pytest.mark.parametrize(("name", "tells"), [("EngineCore_DP1", True), ("Worker", False)])
    def test_an_engines_own_process(self, place: Path, name: str, tells: bool) -> None:
        child = get_context("spawn").Process(
            target=phases.begin_in_engine, args=(phases.WORKER,), name=name
        )
        child.start()
        child.join()
        assert [phase for phase, _ in phases.begun(place)] == [phases.WORKER] * tells


class TestLog:
    def test_one_line_a_phase_and_not_more(self, place: Path, clock: list[float]) -> None:
        written: list[str] = []
        start = Progress(place, LogLines(written.append, as_json=False), BEGAN_S)
        told_at(clock, (0, phases.IMPORTING), (14.25, phases.ENGINE))
        start.ends(phases.READY, "ready at http://localhost:8000", lambda: True)
        assert [start.look(BEGAN_S + at_s) for at_s in (14.5, 15.0, 16.0)] == [False] * 3
        told_at(clock, (39, phases.READY))
        assert start.look(BEGAN_S + 39.1)
        assert written == [
            "ConServe at 0.0 s: importing vLLM\n",
            "ConServe at 14.2 s: starting the engine process\n",
            "ConServe at 39.1 s: ready at http://localhost:8000\n",
        ]

    def test_json(self, place: Path, clock: list[float]) -> None:
        written: list[str] = []
        start = Progress(place, LogLines(written.append, as_json=True), BEGAN_S)
        told_at(clock, (2.5, phases.LOADING))
        start.look(BEGAN_S + 3)
        assert json.loads(written[0]) == {
            "message": "ConServe at 2.5 s: loading the model",
            "phase": "loading the model",
            "start_s": 2.5,
        }

    def test_it_is_not_ready_before_it_takes_connections(
        self, place: Path, clock: list[float]
    ) -> None:
        written: list[str] = []
        opens = iter([False, True])
        start = Progress(place, LogLines(written.append, as_json=False), BEGAN_S)
        start.ends(phases.READY, "ready", lambda: next(opens))
        told_at(clock, (8, phases.READY))
        assert not start.look(BEGAN_S + 8)
        assert written == []
        assert start.look(BEGAN_S + 9)
        assert written == ["ConServe at 9.0 s: ready\n"]


class Screen:
    """A terminal's lines, as far as the writer and a log need one."""

    def __init__(self, columns: int = 80) -> None:
        self.rows, self.column, self.width = [""], 0, columns

    def columns(self) -> int:
        return self.width

    def write(self, text: str) -> None:
        while text:
            if text.startswith(ERASE):
                self.rows[-1], self.column, text = "", 0, text[len(ERASE) :]
                continue
            self._put(text[0])
            text = text[1:]

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.rows.append("")
            self.column = 0
        else:
            assert self.column < self.width - 1, "the line breaks, and cannot be written anew"
            row = self.rows[-1]
            self.rows[-1] = row[: self.column] + character + row[self.column + 1 :]
            self.column += 1


def on(screen: Screen, place: Path) -> Progress:
    return Progress(place, TerminalLine(screen.write, screen.columns), BEGAN_S)


class TestTerminal:
    def test_one_line_is_written_anew(self, place: Path, clock: list[float]) -> None:
        screen = Screen()
        start = on(screen, place)
        told_at(clock, (2, phases.LOADING))
        start.look(BEGAN_S + 3)
        assert screen.rows == ["ConServe: loading the model, 1 s"]
        start.look(BEGAN_S + 14)
        assert screen.rows == ["ConServe: loading the model, 12 s"]

    def test_vllms_lines_stay_as_they_are(self, place: Path, clock: list[float]) -> None:
        screen = Screen(columns=120)
        start = on(screen, place)
        told_at(clock, (2, max(phases.NAMES, key=len)))
        start.look(BEGAN_S + 999)
        assert 0 < len(screen.rows[0]) <= LONGEST_UNCOVERED
        vllms = "(EngineCore pid=1) INFO 11-27 17:40:18 [core.py:133] x"
        screen.write(f"{vllms}\n")
        start.look(BEGAN_S + 1000)
        assert screen.rows[0] == vllms
        assert screen.rows[1].startswith("ConServe: ")

    def test_only_the_last_line_stays(self, place: Path, clock: list[float]) -> None:
        screen = Screen()
        start = on(screen, place)
        start.ends(phases.READY, "ready at http://localhost:8000", lambda: True)
        told_at(clock, (2, phases.LOADING))
        start.look(BEGAN_S + 3)
        told_at(clock, (39, phases.READY))
        start.look(BEGAN_S + 39)
        last = "ConServe: ready at http://localhost:8000, 39 s after the start"
        assert screen.rows == [last, ""]

    def test_others_get_a_clear_line(self, place: Path, clock: list[float]) -> None:
        screen = Screen()
        start = on(screen, place)
        told_at(clock, (2, phases.IMPORTING))
        start.look(BEGAN_S + 3)
        with start.aside():
            screen.write("short\n")
        assert screen.rows == ["short", ""]

    def test_a_narrow_one(self, place: Path, clock: list[float]) -> None:
        screen = Screen(columns=20)
        told_at(clock, (2, phases.LOADING))
        on(screen, place).look(BEGAN_S + 3)
        assert screen.rows == ["ConServe: loading t"]


@pytest.mark.parametrize(
    ("is_terminal", "as_json", "kind"),
    [(True, False, TerminalLine), (True, True, LogLines), (False, False, LogLines)],
)
def test_what_suits_where_it_is_read(is_terminal: bool, as_json: bool, kind: type) -> None:
    line = line_for(print, is_terminal=is_terminal, as_json=as_json, columns=lambda: 80)
    assert isinstance(line, kind)


def test_around_a_start_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    """What it had come to is said, and nothing is left behind."""

    def fail() -> None:
        with progress.shown(as_json=False):
            phases.begin(phases.IMPORTING)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    written = capfd.readouterr().err
    assert re.fullmatch(r"ConServe at \d+\.\d s: importing vLLM\n", written), written
    assert not phases.are_told()


class TestIsOpen:
    def test_a_port(self) -> None:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            for host in (None, "", "0.0.0.0", "127.0.0.1"):
                args = argparse.Namespace(uds=None, host=host, port=listening.getsockname()[1])
                assert not address.is_open(args), "bound is not open"
            listening.listen()
            for host in (None, "", "0.0.0.0", "127.0.0.1"):
                args = argparse.Namespace(uds=None, host=host, port=listening.getsockname()[1])
                assert address.is_open(args)

    def test_a_socket_file(self, tmp_path: Path) -> None:
        args = argparse.Namespace(uds=str(tmp_path / "s"), host=None, port=0)
        assert not address.is_open(args)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(args.uds)
            listening.listen()
            assert address.is_open(args)


def test_every_process_reads_one_clock(place: Path) -> None:
    before = time.monotonic()
    child = get_context("spawn").Process(target=phases.begin, args=(phases.LOADING,))
    child.start()
    child.join()
    ((_, at_s),) = phases.begun(place)
    assert before <= at_s <= time.monotonic()
