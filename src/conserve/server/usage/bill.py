"""From the meters of one API process to its rows in the database."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

from prometheus_client import Counter, Gauge

from conserve.batch.outage import Outage
from conserve.batch.stores import Stores
from conserve.batch.usage_ledger import UsageLedger
from conserve.batch.usage_store import MODEL_CHARACTERS, Billed, Counts
from conserve.server.lifespan import running
from conserve.server.usage.meter import Meter

logger = logging.getLogger(__name__)

EVERY_S = 5.0
"""Between two times that counts are saved: what a crash loses."""
LAST_TRY_S = 5.0
"""How long the end of the server waits for the database."""

TOKENS = Counter(
    "conserve:usage_tokens",
    "Tokens billed to online and flex requests, by what they are.",
    ["class", "kind"],
)
REQUESTS = Counter(
    "conserve:usage_requests",
    "Online and flex requests billed, by how they ended.",
    ["class", "outcome"],
)
WAITING = Gauge(
    "conserve:usage_waiting_requests",
    "Requests that have ended and are billed in no database yet.",
    multiprocess_mode="livesum",
)
KINDS = {"input": "input_tokens", "cached": "cached_tokens", "output": "output_tokens"}
OUTCOMES = ("completed", "failed")
for _class in ("online", "flex"):  # a rate needs a first value
    for _kind in KINDS:
        TOKENS.labels(_class, _kind)
    for _outcome in OUTCOMES:
        REQUESTS.labels(_class, _outcome)


class Bill:
    def __init__(self, stores: Stores, model: str, *, by_key: bool) -> None:
        """`model`: what is billed where no adapter is named."""
        self.by_key = by_key
        self._stores = stores
        self._model = model
        self._ledger = UsageLedger(stores.usage, f"api-{uuid4().hex}")
        self._open: set[Meter] = set()
        """Of requests that are not counted in full yet."""
        self._outage = Outage(logger, "usage waits to be stored")

    def open(self, owner: str) -> Meter:
        """A meter, for one request of a client."""
        meter = Meter(owner, self._open.add)
        self._open.add(meter)
        return meter

    def end(self, meter: Meter, *, is_complete: bool) -> None:
        """The client has its answer, or will not get it."""
        meter.end(is_complete=is_complete)
        self._gather(meter)

    def gather(self) -> None:
        """Count what open requests have had so far, and let go of those that are over."""
        for meter in list(self._open):
            self._gather(meter)

    def _gather(self, meter: Meter) -> None:
        is_last = meter.is_over and not meter.is_running
        self._count(meter, meter.take())
        if is_last:
            self._open.discard(meter)

    def _count(self, meter: Meter, counts: Counts) -> None:
        if counts == Counts():
            return
        model, request_class = meter.model or self._model, meter.request_class
        self._ledger.add(Billed(meter.owner, request_class, model[:MODEL_CHARACTERS]), counts)
        for kind, name in KINDS.items():
            TOKENS.labels(request_class, kind).inc(getattr(counts, name))
        for outcome in OUTCOMES:
            REQUESTS.labels(request_class, outcome).inc(getattr(counts, outcome))
        WAITING.set(self._ledger.num_waiting)

    async def save(self) -> None:
        """An outage of the database leaves it all for the next time."""
        with self._outage.survived():
            self.gather()
            await self._stores.prepare()
            await self._ledger.save()
        WAITING.set(self._ledger.num_waiting)

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Saved every few seconds for as long as the block runs, and at its end."""
        try:
            async with running(self._save_for_ever(), "conserve-usage"):
                yield
        finally:
            await self._save_what_is_left()

    async def _save_what_is_left(self) -> None:
        try:
            await asyncio.wait_for(self.save(), LAST_TRY_S)
        except TimeoutError:
            logger.warning("usage of the last seconds is lost: the database does not answer")

    async def _save_for_ever(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            await self.save()
