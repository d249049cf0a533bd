"""Feeds leased lines to the executor and stores what they come to."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from contextlib import suppress

from conserve.batch.deadlines import RecentHarvest
from conserve.batch.errors import StoreUnavailableError
from conserve.batch.event import wait_for_event
from conserve.batch.executor import Executor, Reply
from conserve.batch.harvest_meter import HarvestMeter
from conserve.batch.in_flight import InFlightWindow, retry_delay_s
from conserve.batch.outage import Outage
from conserve.batch.outcome import (
    OVERLOAD,
    Outcome,
    Postponed,
    Result,
    engine_id,
    failure,
    from_reply,
    keep_reply,
)
from conserve.batch.outlook import Outlook, Prospect
from conserve.batch.put_aside import PutAside
from conserve.batch.records import Line
from conserve.batch.request_reader import Request, RequestReader
from conserve.batch.served import Served
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from conserve.batch.turns import Turns

logger = logging.getLogger(__name__)

# Claims are transactions: worth one only when this share of the window is free.
CLAIM_SHARE = 8
STORE_RETRY_S = 1.0
NOTHING = Outlook(0.0, RecentHarvest(), {})
DEATHS_ALONE = 3
"""Of the engine, under one line alone, after which that line is failed."""


class Dispatcher:
    """One worker's lines in flight. A slot is free again when the line's result is stored, so a
    database that is away for a while stops the feeding and costs no memory."""

    def __init__(
        self,
        worker_id: str,
        stores: Stores,
        executor: Executor,
        served: Served,
        settings: BatchSettings,
        clock: Callable[[], float],
    ) -> None:
        self._worker_id = worker_id
        self._leases = stores.leases
        self._lookout = stores.lookout
        self._shares = stores.shares
        self._turns = Turns()
        self._aside = PutAside()
        self._harvest = HarvestMeter(worker_id, stores.harvest)
        self._reader = RequestReader(stores.batches, stores.contents)
        self._executor = executor
        self._served = served
        self._settings = settings
        self._clock = clock
        self._window = InFlightWindow(settings.max_in_flight)
        self._in_flight: dict[Line, asyncio.Task[None]] = {}
        self._in_flight_bytes = 0
        self._revoked: set[Line] = set()
        self._finished: list[Outcome] = []
        self._any_finished = asyncio.Event()
        self._closing = False
        self._is_unsure = False

    async def run(self, stopping: asyncio.Event, wake: asyncio.Event) -> None:
        """Feed until `stopping`, then wait up to `drain_s` for what is in flight.

        Lines cut off at the end stay leased: the worker gives them back as it retires.
        Raises LeaseLostError when the worker was taken for dead.
        """
        outage = Outage(logger, "feeding pauses")
        async with asyncio.TaskGroup() as group:
            group.create_task(self._store(wake))
            while not stopping.is_set():
                wake.clear()
                with outage.survived((StoreUnavailableError,)):
                    await self._turn(group)
                await wait_for_event(wake, self._settings.poll_s)
            await self._drain()

    async def _drain(self) -> None:
        """Every line in flight ends or is cut off, and `_store` ends with the last result."""
        tasks = list(self._in_flight.values())
        if tasks and self._settings.drain_s:
            await asyncio.wait(tasks, timeout=self._settings.drain_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._closing = True
        self._any_finished.set()

    async def _turn(self, group: asyncio.TaskGroup) -> None:
        """Feed once. After an outage a claim may have been committed though its answer was lost."""
        is_unsure, self._is_unsure = self._is_unsure, True
        if is_unsure:
            await self._leases.give_back_others(self._worker_id, self._in_flight)
        await self._revoke_closed()
        await self._feed(group)
        self._is_unsure = False

    async def _revoke_closed(self) -> None:
        """Stop lines of batches that are cancelled or out of time."""
        running = {line.batch_id for line in self._in_flight}
        if not running:
            return
        closed = await self._leases.closed(running)
        for line, task in self._in_flight.items():
            if line.batch_id in closed and line not in self._revoked:
                self._revoked.add(line)
                task.cancel()

    async def _feed(self, group: asyncio.TaskGroup) -> None:
        free = self._free_slots()
        if free <= 0 or not self._has_bytes_free():
            return
        models = await self._served.names()
        suspected = await self._leases.suspected(self._settings.max_losses, models)
        suspected -= self._aside.batches()
        if self._in_flight and (suspected or any(line.is_suspect for line in self._in_flight)):
            return  # a suspect runs alone
        outlook, waiting = await self._waiting(models)
        if suspected:
            free, waiting = 1, waiting & suspected
        while free > 0 and (waiting := waiting - self._aside.batches()):
            for prospect, limit in self._turns.share_out(outlook, waiting, free):
                claimed = await self._claim(prospect, limit, suspects=bool(suspected))
                free -= len(claimed)
                if len(claimed) < limit:
                    waiting.discard(prospect.view.batch_id)
                await self._start(group, claimed, prospect.engine_priority)
                await self._settle(outlook, prospect, len(claimed))
                if not self._has_bytes_free():
                    return

    async def _claim(self, prospect: Prospect, limit: int, *, suspects: bool) -> list[Line]:
        return await self._leases.claim(
            self._worker_id,
            prospect.view.batch_id,
            limit,
            self._settings.max_in_flight_bytes - self._in_flight_bytes,
            self._settings.max_losses,
            suspects=suspects,
        )

    async def _settle(self, outlook: Outlook, prospect: Prospect, num_lines: int) -> None:
        """Count lines that were claimed for their owner, whose credit ends where it uses it."""
        self._turns.took(prospect, num_lines)
        floor = outlook.floors.get(prospect.view.tenant)
        if num_lines and floor is not None:
            await self._shares.lift(prospect.view.tenant, floor)

    async def _waiting(self, models: Collection[str] | None) -> tuple[Outlook, set[str]]:
        """Batches with a line that may be claimed, and what is expected of them."""
        waiting = await self._leases.waiting(self._settings.max_losses, models)
        if not waiting:
            return NOTHING, waiting
        self._lookout.serve(models)
        now = self._clock()
        outlook = await self._lookout.outlook(now)
        if not waiting <= outlook.counted:  # one has been made or validated since
            self._lookout.forget()
            outlook = await self._lookout.outlook(now)
        return outlook, waiting & outlook.prospects.keys()

    def _has_bytes_free(self) -> bool:
        """For one more line, however long: short lines must not keep a long one from its turn."""
        budget = self._settings.max_in_flight_bytes
        free = budget - self._in_flight_bytes
        return free >= min(budget, self._settings.max_line_bytes)

    def _free_slots(self) -> int:
        in_flight, limit = len(self._in_flight), self._window.limit
        free = limit - in_flight
        if in_flight and free < max(1, limit // CLAIM_SHARE):
            return 0
        room = self._executor.room()
        return free if room is None else min(free, room)

    async def _start(self, group: asyncio.TaskGroup, claimed: list[Line], priority: int) -> None:
        for request in await self._read(self._unknown(claimed), priority):
            if isinstance(request, Result):
                self._finish(request)
                continue
            self._harvest.start()
            task = group.create_task(self._run_line(request))
            self._in_flight[request.line] = task
            self._in_flight_bytes += request.line.length

    def _unknown(self, claimed: list[Line]) -> list[Line]:
        """Without lines whose last try is still being stored. Where a group of tries was stored in
        part before the database went away, a line may be given out again that is put back when the
        whole group is stored once more."""
        known = {(line.batch_id, line.line_no) for line in self._in_flight}
        return [line for line in claimed if (line.batch_id, line.line_no) not in known]

    async def _read(self, claimed: list[Line], priority: int) -> list[Request | Result]:
        try:
            return await self._reader.read(claimed, priority)
        except FileNotFoundError as error:
            logger.warning("the input of %s cannot be read: %s", claimed[0].batch_id, error)
            self._finish(*(self._later(line, None) for line in claimed))
        except StoreUnavailableError as error:  # of this file alone, maybe
            logger.warning("the input of %s is away: %s", claimed[0].batch_id, error.for_log)
            self._aside.add(claimed[0].batch_id)
            self._finish(*(Postponed(line, 0.0, counted=False) for line in claimed))
        return []

    async def _run_line(self, request: Request) -> None:
        try:
            outcome = await self._answer(request)
        except asyncio.CancelledError:
            if request.line not in self._revoked:
                raise
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
            outcome = Postponed(request.line, 0.0, counted=False)
        self._finish(outcome)

    async def _answer(self, request: Request) -> Outcome:
        try:
            name = {"x-request-id": engine_id(request.line)}
            reply = await self._executor.run(request.endpoint, request.body, name)
        except Exception as error:
            logger.warning("%s is put off: %r", engine_id(request.line), error)
            return self._later(request.line, None)
        return from_reply(request.line, reply) or self._later(request.line, reply)

    def _later(self, line: Line, reply: Reply | None) -> Outcome:
        """Try again after a while; or keep the failure, when the tries are used up."""
        now = self._clock()
        if reply is not None and reply.engine_died:
            return Postponed(line, now, counted=False, losses=self._blame())
        if reply is not None and reply.status_code in OVERLOAD:
            self._window.on_overload()
            return Postponed(line, now + retry_delay_s(0), counted=False)
        if line.attempts + 1 < self._settings.max_attempts:
            return Postponed(line, now + retry_delay_s(line.attempts), counted=True)
        if reply is not None:
            return keep_reply(line, reply)
        return failure(line, "server_error", f"The server failed {line.attempts + 1} times.")

    def _blame(self) -> int:
        """Losses that the engine's death is worth to each line in flight: one where any of them may
        be the cause, and for a line alone so many that it is failed at the third time."""
        return 1 if len(self._in_flight) > 1 else -(-self._settings.max_losses // DEATHS_ALONE)

    def _finish(self, *outcomes: Outcome) -> None:
        self._finished += outcomes
        self._any_finished.set()

    async def _store(self, wake: asyncio.Event) -> None:
        """Store results in groups: those that come while one group is written form the next."""
        outage = Outage(logger, "results wait for the database")
        while self._finished or not self._closing:
            await self._any_finished.wait()
            self._any_finished.clear()
            group, self._finished = self._finished, []
            stored = None
            with outage.survived((StoreUnavailableError,)):
                stored = await self._record(group)
            if stored is None:
                if self._closing:
                    return  # their lines run again
                self._finished = group + self._finished
                self._any_finished.set()
                await asyncio.sleep(STORE_RETRY_S)
                continue
            self._release(group)
            wake.set()
            with suppress(StoreUnavailableError):  # a rate, not an account
                await self._harvest.count(stored, is_busy=bool(self._in_flight))

    async def _record(self, group: list[Outcome]) -> list[Result]:
        """Store what can be stored; a line whose result cannot be has failed a try."""
        try:
            return await self._leases.record(self._worker_id, group)
        except StoreUnavailableError:
            raise
        except Exception:
            if len(group) > 1:
                return [result for one in group for result in await self._record([one])]
            (outcome,) = group
            logger.exception("the result of %s cannot be stored", engine_id(outcome.line))
            return await self._leases.record(self._worker_id, [self._later(outcome.line, None)])

    def _release(self, group: list[Outcome]) -> None:
        for outcome in group:
            if self._in_flight.pop(outcome.line, None) is not None:
                self._in_flight_bytes -= outcome.line.length
            self._revoked.discard(outcome.line)
            if isinstance(outcome, Result):
                self._window.on_result()
                self._turns.ended(outcome.line.batch_id, outcome.tokens.total)
