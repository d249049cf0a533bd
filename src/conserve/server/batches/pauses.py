"""A word before an operator has vLLM's engine abort all that it has, for a pause or to sleep."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

METHODS = ("pause_generation", "sleep")
"""Of vLLM's client of the engine."""


@contextmanager
def before_pauses(engine: Any, do: Callable[[], None]) -> Iterator[None]:
    """Call `do` before this process has the engine paused or sent to sleep in vLLM's mode `abort`,
    its default. In the others, requests go on later or end first."""
    names = [name for name in METHODS if hasattr(engine, name)]
    for name in names:
        setattr(engine, name, _told_first(getattr(engine, name), do))
    try:
        yield
    finally:
        for name in names:
            delattr(engine, name)


def _told_first(
    method: Callable[..., Coroutine[Any, Any, Any]], do: Callable[[], None]
) -> Callable[..., Coroutine[Any, Any, Any]]:
    async def told(*args: Any, **kwargs: Any) -> Any:
        if signature(method).bind(*args, **kwargs).arguments.get("mode", "abort") == "abort":
            do()
        return await method(*args, **kwargs)

    return told
