"""What `conserve serve` says where its engine does not start: one sentence, from the first cause in
whatever process it was."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conserve.engine.faults import PLACE, FaultWriter, first_fault, write_faults
from conserve.server.errors import StartError
from conserve.server.start.no_start import explained, sentence

GIB = 1024**3
INITIALIZATION = "Engine core initialization failed. See root cause above. Failed core proc(s): "


@pytest.fixture(autouse=True)
def _no_writer_is_left() -> Iterator[None]:
    yield
    logger = logging.getLogger("vllm")
    logger.handlers = [each for each in logger.handlers if not isinstance(each, FaultWriter)]


def log(error: Exception) -> None:
    """As vLLM's processes do when they do not start."""
    write_faults()
    try:
        raise error
    except type(error):
        logging.getLogger("vllm.v1.engine").exception("EngineCore failed to start.")


@pytest.mark.parametrize("on_cpu", [True, False])
def test_vllms_own_words_of_the_cache_become_one_sentence(*, on_cpu: bool) -> None:
    utils = pytest.importorskip("vllm.v1.core.kv_cache_utils")
    flag = "--kv-cache-memory-bytes" if on_cpu else "--gpu-memory-utilization"
    told = []
    for available, fits in ((GIB, 1024), (GIB, 0), (0, 0)):
        with pytest.raises(ValueError, match="memory") as refused:
            utils._check_enough_kv_cache_memory(
                available, lambda: 3 * GIB, 8192, lambda _, fits=fits: fits
            )
        told.append(sentence("ValueError", str(refused.value), on_cpu=on_cpu))
    assert "8192 tokens takes 3.0 GiB" in told[0]
    assert "there are 1.0;" in told[0]
    assert "--max-model-len at most 1024" in told[0]
    assert "--max-model-len a smaller number" in told[1]
    assert "leave none for the KV cache" in told[2]
    assert all(flag in each and "\n" not in each for each in told)


CAUSES = [
    (
        "ValueError",
        "Free memory on device cuda:0 (3.1/79.2 GiB) on startup is less than desired GPU memory "
        "utilization (0.9, 71.28 GiB). Decrease GPU memory utilization.",
        ("3.1/79.2 GiB are free", "--gpu-memory-utilization"),
    ),
    (
        "ValueError",
        "Available memory on node 0 (1.0/8.0 GiB) on startup is less than desired CPU memory "
        "utilization (0.9, 7.2 GiB).",
        ("1.0/8.0 GiB are free",),
    ),
    (
        "OutOfMemoryError",
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        ("quantized", "--tens"),
    ),
    ("RuntimeError", "DefaultCPUAllocator: can't allocate memory: you tried", ("no memory",)),
    ("MemoryError", "", ("no memory",)),
    ("RuntimeError", INITIALIZATION + "{'EngineCore': -9}", ("was killed",)),
    ("KeyError", "'lm_head.weight'\nand a second line", ("did not start: 'lm_head.weight' (",)),
    ("AssertionError", "", ("did not start: AssertionError (",)),
]


@pytest.mark.parametrize(("kind", "text", "parts"), CAUSES)
def test_other_causes(kind: str, text: str, parts: tuple[str, ...]) -> None:
    told = sentence(kind, text, on_cpu=False)
    assert [part for part in parts if part not in told] == []
    assert "\n" not in told


def test_the_first_cause_counts_and_not_what_follows_from_it() -> None:
    def start() -> None:
        with explained(on_cpu=False):
            log(MemoryError("of the worker"))
            log(RuntimeError("WorkerProc initialization failed"))
            raise RuntimeError(INITIALIZATION + "{}")

    with pytest.raises(StartError, match=r"^no memory"):
        start()
    assert PLACE not in os.environ


def test_without_a_cause_the_servers_own_words_are_left() -> None:
    with pytest.raises(StartError, match="killed"), explained(on_cpu=True):
        raise RuntimeError(INITIALIZATION + "{'EngineCore': -9}")
    with pytest.raises(RuntimeError, match="of the app"), explained(on_cpu=True):
        raise RuntimeError("of the app")


def test_words_without_an_error_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLACE, str(tmp_path / "faults"))
    for _ in range(2):
        write_faults()
    logger = logging.getLogger("vllm")
    assert sum(isinstance(each, FaultWriter) for each in logger.handlers) == 1
    logger.error("only words")
    assert first_fault(tmp_path / "faults") is None


def test_a_server_that_has_started_may_log_errors_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "faults"
    monkeypatch.setenv(PLACE, str(place))
    for number in range(3):
        log(ValueError(f"of request {number}"))
    assert len(place.read_text().splitlines()) == 1
    assert first_fault(place) == ("ValueError", "of request 0")


def test_a_process_that_outlives_who_asked_says_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an engine does whose start was ended: logging would print a traceback of its own."""
    monkeypatch.setenv(PLACE, str(tmp_path / "gone" / "faults"))
    log(ValueError("of a worker that was ended, too"))
    assert "gone" not in capsys.readouterr().err


def test_a_fault_of_a_process_that_was_killed_while_it_wrote_is_passed_over(tmp_path: Path) -> None:
    place = tmp_path / "faults"
    place.write_text('["MemoryError", "of the wor')
    assert first_fault(place) is None
    place.write_text('["MemoryError", "of the wor\n["ValueError", "of its engine"]\n')
    assert first_fault(place) == ("ValueError", "of its engine")


STARTING = """
import contextlib, multiprocessing, signal, sys, time
from conserve.server.start.interrupts import ours_until, quiet

def child():
    print("child", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    with quiet(), ours_until(lambda: False):
        def stop(*_):
            raise KeyboardInterrupt("terminated")
        def leave(signum, frame):
            raise SystemExit
        if {vllms} == 1:
            signal.signal(signal.SIGTERM, stop)
        if {vllms} == 2:
            signal.signal(signal.SIGTERM, leave)
            signal.signal(signal.SIGINT, leave)
        multiprocessing.get_context("spawn").Process(target=child).start()
        print("parent", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # as vLLM, while it waits for its engine
            time.sleep(600)
        time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("vllms", [0, 1, 2])
def test_a_signal_while_it_starts_ends_all_of_it_without_a_traceback(
    tmp_path: Path, number: signal.Signals, vllms: int
) -> None:
    """`vllms`: vLLM has put its own handlers in the place of ours, of SIGTERM where it starts one
    API server (1), of both where it starts several (2)."""
    script = tmp_path / "starting.py"
    script.write_text(STARTING.format(vllms=vllms))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert {process.stdout.readline() for _ in range(2)} == {"parent\n", "child\n"}
    if number == signal.SIGINT:  # as a terminal's: to all of them
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, said = process.communicate(
        timeout=60
    )  # to the end of the child, too, which has the same pipes
    assert said == f"conserve serve: ended by {number.name}.\n"
    assert process.returncode == 128 + number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_where_nobody_reads_any_more(
    tmp_path: Path, number: signal.Signals
) -> None:
    """As where the log's collector has ended first."""
    script = tmp_path / "starting.py"
    script.write_text(STARTING.format(vllms=1))
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, str(script)], stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert {process.stdout.readline() for _ in range(2)} == {b"parent\n", b"child\n"}
        process.stdout.close()
        process.stderr.close()
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number


STARTED = """
import os, signal
from conserve.server.start.interrupts import ours_until, quiet

is_over = False
with quiet(), ours_until(lambda: is_over):
    signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"vLLM ends "))
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"a fork ends "))
        signal.raise_signal(signal.SIGTERM)
        os._exit(0)
    os.wait()
    is_over = True
    signal.raise_signal(signal.SIGTERM)
signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"others end"))
signal.raise_signal(signal.SIGTERM)
"""


def test_who_has_started_ends_as_vllm_does_and_so_does_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTED], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == (
        "a fork ends vLLM ends others end",
        "",
        0,
    )


IMPORTING = """
import signal
from conserve.server.start.interrupts import quiet

with quiet():
    try:
        signal.raise_signal({number})
    except BaseException:  # as some packages do around what they import
        pass
    print("went on")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_no_package_that_is_imported_can_swallow_a_signal(number: signal.Signals) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING.format(number=int(number))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("", 128 + number)
    assert done.stderr == f"conserve serve: ended by {number.name}.\n"
