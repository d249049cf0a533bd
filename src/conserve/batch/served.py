"""The models this process serves: it takes no line of another's."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping

from conserve.batch.errors import StoreUnavailableError
from conserve.batch.executor import Executor, UnknownModelsError
from conserve.batch.rules import ModelLimits

logger = logging.getLogger(__name__)

FRESH_S = 10.0
MIDDLEWARE = (
    "Where a --middleware wants a header, name it in CONSERVE_BATCH_REQUEST_HEADERS, as in "
    """'{"X-Gateway": "..."}'."""
)


class Served:
    """What the executor says of its models, asked for when needed and remembered for a while."""

    def __init__(self, executor: Executor, clock: Callable[[], float] = time.monotonic) -> None:
        self._executor = executor
        self._clock = clock
        self._models: Mapping[str, ModelLimits] | None = {}
        self._asked_s = -math.inf

    async def models(self) -> Mapping[str, ModelLimits] | None:
        """As they are now; None where the app names no models: then it may be any.

        Raises StoreUnavailableError when the executor does not answer.
        """
        try:
            self._models = await self._executor.models()
        except Exception as error:
            reason = f": {error}. {MIDDLEWARE}" if isinstance(error, UnknownModelsError) else "."
            message = f"The server does not say which models it has{reason}"
            raise StoreUnavailableError(message) from error
        self._asked_s = self._clock()
        return self._models

    async def names(self) -> frozenset[str] | None:
        """As they were lately. Raises StoreUnavailableError."""
        if self._clock() >= self._asked_s + FRESH_S:
            await self.models()
        return None if self._models is None else frozenset(self._models)
