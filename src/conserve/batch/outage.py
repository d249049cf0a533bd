"""Work that is done again and again for as long as a server runs, and that may fail for a while."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from conserve.batch.errors import StoreUnavailableError


class Outage:
    """Said when it begins, or turns into another, and not at each try."""

    def __init__(self, logger: logging.Logger, told: str) -> None:
        """`told`: what comes of it, for the log."""
        self._logger = logger
        self._told = told
        self._kind: type[Exception] | None = None

    @contextmanager
    def survived(self, kinds: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
        """Around each try, for errors of these kinds. Whatever one ends with, the next may do: a
        database without our tables is one that is being restored."""
        try:
            yield
        except kinds as error:
            if type(error) is not self._kind:
                self._say(error)
            self._kind = type(error)
        else:
            self._kind = None

    def _say(self, error: Exception) -> None:
        if isinstance(error, StoreUnavailableError):
            self._logger.warning("%s: %s", self._told, error.for_log)
        else:
            self._logger.error(self._told, exc_info=error)
