"""Ctrl-C and SIGTERM while the server starts: it ends in silence, and so does what it has started.

A terminal sends Ctrl-C to all processes of the server at once, and one that is being made answers
with a traceback. So those that we start do not hear of it: the server ends them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

GRACE_S = 5.0
"""What processes get to end before they are killed."""

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class _Ended(BaseException):
    """A signal has come. On its way vLLM lets go of what it has. It is no KeyboardInterrupt: these
    vLLM swallows in places, and goes on to start."""


@contextmanager
def quiet() -> Iterator[None]:
    """Around the life of a server. A signal that comes before the server has its own way to end
    ends the process, with the status that a shell gives it."""
    came = [signal.SIGINT]

    def end(number: int, _frame: FrameType | None) -> None:
        came[0] = signal.Signals(number)
        if not multiprocessing.active_children():
            # Nothing is to be let go of, and imports swallow exceptions, or make others of them.
            _leave(came[0])
        raise _Ended

    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    before = {number: signal.signal(number, end) for number in NUMBERS}
    try:
        with _unheard_by_children():
            yield
    except (KeyboardInterrupt, _Ended):
        _leave(came[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ours_until(is_over: Callable[[], bool]) -> Iterator[None]:
    """Inside of `quiet`: whatever handlers vLLM puts in the place of ours, until the start is over
    ours count. Its own raise a KeyboardInterrupt, which it swallows while it waits for its engine,
    or leave as after a whole life."""
    put, home = signal.signal, os.getpid()
    ours: dict[int, Any] = {number: signal.getsignal(number) for number in NUMBERS}

    def put_behind(number: int, handler: Any) -> Any:
        first = ours.get(number)
        # A process that is forked has a life of its own.
        if not callable(first) or not callable(handler) or os.getpid() != home:
            return put(number, handler)
        return put(number, lambda *came: (handler if is_over() else first)(*came))

    signal.signal = put_behind  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = put


@contextmanager
def _unheard_by_children() -> Iterator[None]:
    """A blocked signal stays blocked in the processes that are started meanwhile."""
    start = BaseProcess.start

    def start_unheard(self: Any) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            start(self)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    BaseProcess.start = start_unheard  # type: ignore[method-assign]
    try:
        yield
    finally:
        BaseProcess.start = start  # type: ignore[method-assign]


def _leave(number: signal.Signals) -> None:
    """Without the interpreter's own way out, in which vLLM's threads would be missed."""
    for each in NUMBERS:
        signal.signal(each, signal.SIG_IGN)
    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    for child in children:
        child.join(GRACE_S)
        if child.is_alive():
            child.kill()
    with suppress(OSError, ValueError):  # whoever read it may have ended before
        sys.stderr.write(f"conserve serve: ended by {number.name}.\n")
        sys.stderr.flush()
        sys.stdout.flush()
    os._exit(128 + number)
