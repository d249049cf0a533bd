"""One thin file a command.

What stands here comes before commands are imported, which takes most of a second.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType


def _without_words(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Ctrl-C that nobody takes, as while commands are imported, ends them without a traceback."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


def _end(number: int, _frame: FrameType | None) -> None:
    os._exit(128 + number)


sys.excepthook = _without_words
# The first process of a container hears of no signal that it has no handler for.
if os.getpid() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
    signal.signal(signal.SIGTERM, _end)
