"""Which line of a batch a request of this API process is for, told by the batch service alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

NAME = re.compile(r"(batch_[0-9a-f]{32})-([0-9]+)")
"""What the batch service calls a line's request."""

_line: ContextVar[tuple[str, int] | None] = ContextVar("conserve_batch_line", default=None)


@contextmanager
def running_line(name: str) -> Iterator[None]:
    """What is asked of the engine in the block is the line's of that name. What a client calls its
    own request says nothing: any client may use any name."""
    match = NAME.fullmatch(name)
    token = _line.set((match[1], int(match[2])) if match else None)
    try:
        yield
    finally:
        _line.reset(token)


def current_line() -> tuple[str, int] | None:
    """Batch and number of the line whose request this is, if it is one's."""
    return _line.get()
