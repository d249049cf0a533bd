"""One thin file a command."""

from __future__ import annotations

import sys
from types import TracebackType


def _without_words(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Ctrl-C that nobody takes, as while commands are imported, ends them without a traceback."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _without_words
