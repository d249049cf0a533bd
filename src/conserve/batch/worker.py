"""One process's share of the work: heartbeats, takeovers, jobs, lines, and clearing away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from random import Random

from conserve.batch.assembly import Assembly
from conserve.batch.dispatcher import Dispatcher
from conserve.batch.errors import LeaseLostError, StoreUnavailableError
from conserve.batch.event import wait_for_event
from conserve.batch.ids import new_worker_id
from conserve.batch.in_flight import retry_delay_s
from conserve.batch.intake import Intake
from conserve.batch.outage import Outage
from conserve.batch.outcome import failure
from conserve.batch.presence import Presence, forget, is_gone, sweep
from conserve.batch.records import BatchRecord
from conserve.batch.served import Served
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from conserve.batch.wire import LineErrorObject

logger = logging.getLogger(__name__)

BEATS_A_LEASE = 3
RESTART_S = 1.0
JOB_RETRY_S = 5.0
COLLECT_EVERY_S = 60.0

MakeDispatcher = Callable[[str], Dispatcher]
Outages = BaseExceptionGroup[StoreUnavailableError]


class Worker:
    """Works until stopped, through every outage of the database.

    A worker taken for dead drops what it has in flight and goes on under a new name, so that
    nothing it held can be stored twice.
    """

    def __init__(
        self,
        stores: Stores,
        settings: BatchSettings,
        intake: Intake,
        assembly: Assembly,
        served: Served,
        make_dispatcher: MakeDispatcher,
        clock: Callable[[], float],
    ) -> None:
        self._clock = clock
        self._warned: set[str] = set()
        self._strangers: set[str] = set()
        self._num_workers = 1
        self._dice = Random()  # noqa: S311  (no secret)
        self._stores = stores
        self._settings = settings
        self._intake = intake
        self._assembly = assembly
        self._served = served
        self._make_dispatcher = make_dispatcher
        self._stopping = asyncio.Event()
        self._feed_wake = asyncio.Event()
        self._job_wake = asyncio.Event()

    def wake(self) -> None:
        """Something is to be done that the next look at the database would find later."""
        self._feed_wake.set()
        self._job_wake.set()

    def stop(self) -> None:
        self._stopping.set()
        self.wake()

    async def run(self) -> None:
        """Returns after `stop`, with everything given back that could be."""
        outage = Outage(logger, "the batch service waits")
        while not self._stopping.is_set():
            is_ready = False
            with outage.survived():
                await self._stores.prepare()
                is_ready = True
            if is_ready:
                await self._live()
            await wait_for_event(self._stopping, RESTART_S)

    async def _live(self) -> None:
        """One life, whatever ends it."""
        try:
            await self._live_once()
        except* StoreUnavailableError as group:
            logger.warning("the batch service waits: %s", _first(group).for_log)
        except* LeaseLostError:
            logger.warning("this worker was taken for dead; it goes on under a new name")
        except* Exception:
            logger.exception("the batch service starts over")

    async def _live_once(self) -> None:
        worker_id = new_worker_id()
        folder = self._settings.workers_dir
        presence = Presence(folder, worker_id)
        try:
            await self._stores.workers.enlist(worker_id)
            try:
                await self._work(worker_id)
            finally:
                await self._retire(worker_id)
        finally:
            presence.leave()

    async def _work(self, worker_id: str) -> None:
        async with asyncio.TaskGroup() as group:
            loops = (
                self._repeat(lambda: self._beat_s, self._beat, worker_id),
                self._repeat(self._turn_s, self._jobs, worker_id, self._job_wake),
                self._repeat(self._turn_s, self._tidy, worker_id),
                self._repeat(self._turn_s, self._tell, worker_id),
                self._repeat(lambda: COLLECT_EVERY_S, self._collect, worker_id),
                self._repeat(lambda: COLLECT_EVERY_S, self._warn, worker_id),
            )
            helpers = [group.create_task(loop) for loop in loops]
            await self._make_dispatcher(worker_id).run(self._stopping, self._feed_wake)
            for helper in helpers:
                helper.cancel()

    @property
    def _beat_s(self) -> float:
        return self._settings.lease_s / BEATS_A_LEASE

    def _turn_s(self) -> float:
        """Between this worker's looks at what any worker may do. All together look about as often
        as one alone, or a thousand would keep the database busy with looks; each looks once a
        heartbeat, since the others may go. Not all at the same moment, though they start at one."""
        fair_s = min(self._settings.poll_s * self._num_workers, self._beat_s)
        return fair_s if self._num_workers == 1 else fair_s * self._dice.uniform(0.5, 1.5)

    async def _retire(self, worker_id: str) -> None:
        try:
            await self._stores.workers.retire(worker_id)
        except StoreUnavailableError:
            logger.warning("work in hand is given back when its lease ends")

    async def _repeat(
        self,
        every_s: Callable[[], float],
        step: Callable[[str], Awaitable[None]],
        worker_id: str,
        wake: asyncio.Event | None = None,
    ) -> None:
        """Run `step` for ever; an outage of the database, or of a disk, skips a turn."""
        never = asyncio.Event()
        outage = Outage(logger, "a part of the batch service waits")
        while True:
            with outage.survived((StoreUnavailableError, OSError)):
                await step(worker_id)
            await wait_for_event(wake or never, every_s())
            (wake or never).clear()

    async def _beat(self, worker_id: str) -> None:
        await self._stores.workers.heartbeat(worker_id)
        folder = self._settings.workers_dir
        for other in await self._stores.workers.overdue():
            await self._bury(other, only_overdue=True)
        others = await self._stores.workers.others(worker_id)
        self._num_workers = 1 + len(others)
        for other in others:
            if is_gone(folder, other):
                await self._bury(other, only_overdue=False)
                forget(folder, other)

    async def _bury(self, other: str, *, only_overdue: bool) -> None:
        if await self._stores.workers.bury(other, only_overdue=only_overdue):
            logger.warning("%s is gone; its lines are taken over", other)
            self.wake()

    async def _tidy(self, worker_id: str) -> None:
        """Expire what is late, fail what brings processes down, forget what is over."""
        await self._stores.jobs.expire()
        losses = self._settings.max_losses
        worn = await self._stores.leases.worn_out(losses)
        if worn:
            message = "The engine or the server ended under this request again and again."
            failures = [failure(line, "server_error", message) for line in worn]
            await self._stores.leases.record(None, failures)
        while await self._stores.ended.clear_lines():
            pass

    async def _tell(self, _worker_id: str) -> None:
        """Tell owners of batches that have ended."""
        await self._stores.webhooks.deliver()

    async def _collect(self, worker_id: str) -> None:
        """Tidy usage, and clear files away, for as long as their storage takes."""
        await self._stores.usage.tidy(self._settings.usage_days)
        alive = {worker_id, *await self._stores.workers.others(worker_id)}
        await asyncio.to_thread(sweep, self._settings.workers_dir, alive)
        await self._stores.files.collect()
        await self._stores.contents.clear_leavings()

    async def _warn(self, worker_id: str) -> None:
        await self._warn_of_misses()
        await self._warn_of_strangers(worker_id)

    async def _warn_of_strangers(self, worker_id: str) -> None:
        """Say once of each batch that no server left here has its model."""
        names = await self._served.names()
        if names is None or await self._stores.workers.others(worker_id):
            return
        outlook = await self._stores.lookout.outlook(self._clock())
        for batch_id, prospect in outlook.prospects.items():
            model = prospect.view.model
            if model is not None and model not in names and batch_id not in self._strangers:
                logger.warning("%s waits for a server of %r", batch_id, model)
                self._strangers.add(batch_id)
        self._strangers &= set(outlook.prospects)

    async def _warn_of_misses(self) -> None:
        """Say once of each batch that it will miss its deadline, while there is time to act."""
        outlook = await self._stores.lookout.outlook(self._clock())
        for batch_id, prospect in outlook.prospects.items():
            if prospect.state == "will_miss" and batch_id not in self._warned:
                logger.warning("%s will miss its deadline at the recent rate", batch_id)
                self._warned.add(batch_id)
        self._warned &= set(outlook.prospects)

    async def _jobs(self, worker_id: str) -> None:
        """Validate and assemble until nothing is left to."""
        while True:
            batch = await self._stores.jobs.claim(worker_id, await self._served.names())
            if batch is None:
                return
            try:
                await self._job(batch)
            except LeaseLostError:
                logger.info("%s changed hands or was cancelled", batch.id)

    async def _job(self, batch: BatchRecord) -> None:
        """One try: the job is done, put off, or has failed for good. Raises LeaseLostError."""
        if batch.losses > self._settings.max_losses:
            await self._give_up(batch, f"The process that worked on it ended {batch.losses} times.")
            return
        try:
            await self._do(batch)
        except LeaseLostError:
            raise
        except StoreUnavailableError as error:  # no fault of the batch's
            logger.warning("%s is tried again in %g s: %s", batch.id, JOB_RETRY_S, error.for_log)
            await self._stores.jobs.postpone(batch, JOB_RETRY_S, counted=False)
        except Exception as error:
            logger.warning("a job of %s failed", batch.id, exc_info=True)
            await self._try_again(batch, error)

    async def _try_again(self, batch: BatchRecord, error: Exception) -> None:
        tries = batch.attempts + 1
        if tries >= self._settings.max_attempts:
            await self._give_up(batch, f"The server failed {tries} times: {error!r}"[:500])
        else:
            delay_s = JOB_RETRY_S * retry_delay_s(batch.attempts)
            await self._stores.jobs.postpone(batch, delay_s, counted=True)

    async def _give_up(self, batch: BatchRecord, message: str) -> None:
        logger.error("%s fails: %s", batch.id, message)
        reason = LineErrorObject(code="server_error", message=message)
        await self._stores.jobs.give_up(batch, reason)

    async def _do(self, batch: BatchRecord) -> None:
        if batch.is_to_validate:
            await self._intake.run(batch)
        else:
            await self._assembly.run(batch)
        self._feed_wake.set()


def _first(group: Outages) -> StoreUnavailableError:
    """Task groups within task groups raise groups within groups."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
