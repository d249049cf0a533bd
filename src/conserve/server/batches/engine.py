"""What the batch service needs to know of the engine behind the app: what suits it, and when it
is going. vLLM's objects are only read here: its arguments, its config, its client of the engine."""

from __future__ import annotations

import asyncio
import signal
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import msgspec

from conserve.batch.executor import Executor, Reply
from conserve.batch.rules import ModelLimits
from conserve.batch.settings import BatchSettings
from conserve.engine.batch_line import running_line
from conserve.server.keys import api_keys

CPU_LINES = 32
"""For each engine on a CPU, which is full long before it runs vLLM's default of 128 sequences."""
QUEUE_SHARE = 4
"""At most one in so many places of the engine's queue is for lines; the others are for clients."""
DRAIN_SHARE = 0.8
"""Of vLLM's `--shutdown-timeout`; the rest is left to give lines back and to end the engine."""

RESPONSES = "/v1/responses"
LOOK_S = 1.0
"""Between looks at whether an engine that does not answer is dead."""

TOLD_TO_END = (0, -signal.SIGTERM, -signal.SIGINT)
"""How an engine's process ends that was told to."""
NOT_NOW = Reply(503, b"")
DIED = Reply(503, b"", engine_died=True)
ABORTED = Reply(
    500,
    b'{"error":{"message":"The request was aborted at the server.","type":"aborted",'
    b'"param":null,"code":"request_aborted"}}',
)
"""Somebody aborted this line, and it counts: or who aborts it again and again would never be rid
of it."""


def fitting_settings(args: Namespace, config: Any) -> BatchSettings:
    """The environment's settings; what it leaves open is chosen to suit this server."""
    chosen = {
        "tenant_by_key": bool(api_keys(args)),
        "max_in_flight": lines_in_flight(config),
        "drain_s": DRAIN_SHARE * config.shutdown_timeout,
    }
    given = BatchSettings().model_fields_set
    return BatchSettings(**{name: value for name, value in chosen.items() if name not in given})


def lines_in_flight(config: Any) -> int:
    """One API process's share of a little more than the engines run at once, far below the limit
    of their queue."""
    scheduler, parallel = config.scheduler_config, config.parallel_config
    engines: int = parallel.data_parallel_size
    if parallel.local_engines_only:
        engines = parallel.data_parallel_size_local
    at_once: int = scheduler.max_num_seqs
    lines = engines * (at_once * 9 // 8)
    if config.device_config.device_type == "cpu":
        lines = min(lines, engines * CPU_LINES)
    queue: int | None = scheduler.max_num_queued_reqs
    if queue is not None:
        lines = min(lines, queue // QUEUE_SHARE)
    processes: int = parallel._api_process_count
    return max(1, lines // processes)


class EngineExecutor:
    """An executor whose engine may go. What a going engine answers is no answer to a line, and
    counts against none, unless it died: the line waits for the engine, or the server, that comes
    next."""

    def __init__(self, executor: Executor, engine: Any) -> None:
        self._executor = executor
        self._engine = engine
        self.is_leaving = False
        """Set when the engine is about to be stopped; nothing it says from then on is kept."""
        self._num_pauses = 0

    def pauses(self) -> None:
        """To be called before an operator pauses the engine: it may abort all it has."""
        self._num_pauses += 1

    async def run(self, url: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        num_pauses = self._num_pauses
        with running_line(headers.get("x-request-id", "")):
            reply = await self._executor.run(url, body, headers)
        if self.is_leaving:
            return NOT_NOW  # an engine that is told to end is dead, too, by then
        if reply.status_code >= 500 and self._engine.errored:
            return DIED if has_crashed(self._engine) else NOT_NOW
        cut_short = _is_cut_short(reply)
        # What an engine has cut short of a response looks complete.
        doubtful = cut_short or url == RESPONSES
        if doubtful and (self._num_pauses != num_pauses or not await self._is_going_on()):
            return NOT_NOW
        return ABORTED if cut_short else reply

    async def _is_going_on(self) -> bool:
        """Whether the engine works and takes questions: one that was told to stop refuses them, and
        one that was paused, by another process maybe, has aborted what it had."""
        asking = asyncio.ensure_future(self._engine.is_sleeping())
        try:
            while not asking.done() and not self._engine.errored:
                await asyncio.wait({asking}, timeout=LOOK_S)
            answered = asking.done() and asking.exception() is None
            return answered and not asking.result() and not self.is_leaving
        finally:
            asking.cancel()

    async def models(self) -> Mapping[str, ModelLimits] | None:
        return await self._executor.models()

    def serves(self, endpoint: str) -> bool:
        return self._executor.serves(endpoint)

    def room(self) -> int | None:
        return 0 if self.is_leaving or self._engine.errored else self._executor.room()


def has_crashed(engine: Any) -> bool:
    """Of an engine that is dead: whether it ended by itself. One that was told to has the code of
    that by now; one that failed says so before its process ends. Of several, those that are left
    are told to end when one has failed: vLLM notes which was the first. Nobody knows in an API
    process that did not start it, nor where Ray did."""
    client = getattr(engine, "engine_core", None)
    manager: Any = getattr(getattr(client, "resources", None), "engine_manager", None)
    if not hasattr(manager, "finished_procs"):
        return False
    codes = manager.finished_procs()
    failed_first = codes.get(manager.failed_proc_name, 0) not in TOLD_TO_END
    return failed_first or not any(code in TOLD_TO_END for code in codes.values())


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice] = []
    status: str | None = None


def _is_cut_short(reply: Reply) -> bool:
    """Whether the engine ended the request itself, as it does when it is told to stop: vLLM sends
    what there is with status 200."""
    if b'"abort"' not in reply.body and b'"cancelled"' not in reply.body:
        return False
    try:
        answer = msgspec.json.decode(reply.body, type=_Answer)
    except (msgspec.DecodeError, RecursionError):
        return False
    aborted = any(choice.finish_reason == "abort" for choice in answer.choices)
    return aborted or answer.status == "cancelled"
