"""One look at all live batches for everybody who asks at about the same time."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection

from conserve.batch.batch_store import BatchStore
from conserve.batch.deadlines import RecentHarvest
from conserve.batch.harvest_store import HarvestStore
from conserve.batch.outlook import Outlook
from conserve.batch.share_store import ShareStore

FRESH_S = 1.0


class Lookout:
    """The order and the prospects of live batches, reckoned once a second however many ask, and
    after each change that `forget` is told of. Raises StoreUnavailableError."""

    def __init__(
        self,
        batches: BatchStore,
        harvest: HarvestStore,
        shares: ShareStore,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._batches = batches
        self._harvest = harvest
        self._shares = shares
        self._monotonic = monotonic
        self._latest = Outlook(-math.inf, RecentHarvest(), {})
        self._fresh_until_s = -math.inf
        self._looking = asyncio.Lock()
        self.served: Collection[str] | None = ()
        """Models whose batches this process runs beside each other; None is any."""

    def serve(self, models: Collection[str] | None) -> None:
        """To be told what `served` is as soon as it is known or changes."""
        if models != self.served:
            self.served = models
            self.forget()

    async def outlook(self, now_s: float) -> Outlook:
        """As it was at `now_s`, or up to FRESH_S before."""
        async with self._looking:
            if not self._is_fresh(now_s):
                await self._look(now_s)
            return self._latest

    async def _look(self, now_s: float) -> None:
        # Set first: a change that we are told of while we look may not be seen.
        self._fresh_until_s = self._monotonic() + FRESH_S
        try:
            harvest, views = await self._harvest.recent(), await self._batches.views()
            standing = await self._shares.standing()
        except BaseException:
            self.forget()
            raise
        self._latest = Outlook.over(views, now_s, harvest, standing, self.served)

    def _is_fresh(self, now_s: float) -> bool:
        """By the clock of this machine, and for the moment that is asked about."""
        by_clock = self._monotonic() < self._fresh_until_s
        return by_clock and 0 <= now_s - self._latest.now_s < FRESH_S

    def forget(self) -> None:
        """Something has changed that whoever asks next must see."""
        self._fresh_until_s = -math.inf
