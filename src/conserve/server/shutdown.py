"""A word before vLLM ends its engine, and one after.

On a signal vLLM shuts its engine down first, from a thread, and ends the app's lifespan last, when
there is nothing left to serve with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def before_shutdown(engine: Any, do: Callable[[float | None], float | None]) -> Iterator[None]:
    """Call `do` before the engine is shut down, in the thread that does so. It gets the seconds
    that the engine has to end, if there is a limit, and returns what it leaves of them."""
    shutdown = engine.shutdown

    def do_first(timeout: float | None = None) -> None:
        shutdown(timeout=do(timeout))

    with _in_its_place(engine, do_first):
        yield


@contextmanager
def after_shutdown(engine: Any, do: Callable[[], object]) -> Iterator[None]:
    """Call `do` when the engine has been shut down, in the thread that did so."""
    shutdown = engine.shutdown

    def do_last(timeout: float | None = None) -> None:
        shutdown(timeout=timeout)
        do()

    with _in_its_place(engine, do_last):
        yield


@contextmanager
def _in_its_place(engine: Any, shutdown: Callable[..., None]) -> Iterator[None]:
    before = vars(engine).get("shutdown")
    engine.shutdown = shutdown
    try:
        yield
    finally:
        if before is not None:
            engine.shutdown = before
        else:
            del engine.shutdown
