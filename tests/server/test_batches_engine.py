"""What suits an engine, and what of a going engine's answers is kept."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
from argparse import Namespace
from typing import Any

import pytest

from conserve.batch.executor import Reply
from conserve.engine.batch_line import current_line
from conserve.server.batches import engine as batches_engine
from conserve.server.batches.engine import EngineExecutor, fitting_settings, lines_in_flight
from conserve.server.batches.pauses import before_pauses

CHAT = "/v1/chat/completions"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("CONSERVE_BATCH_", "VLLM_API_KEY")):
            monkeypatch.delenv(name)


def config(device: str = "cuda", *, shutdown_timeout: int = 0, **changes: Any) -> Namespace:
    """What vLLM's config says where the service reads it."""
    scheduler = {"max_num_seqs": 64, "max_num_queued_reqs": None}
    parallel = {"data_parallel_size": 1, "data_parallel_size_local": 1, "_api_process_count": 1}
    parallel |= {"local_engines_only": False}
    for values in (scheduler, parallel):
        values |= {name: value for name, value in changes.items() if name in values}
    return Namespace(
        scheduler_config=Namespace(**scheduler),
        parallel_config=Namespace(**parallel),
        device_config=Namespace(device_type=device),
        shutdown_timeout=shutdown_timeout,
    )


class Answering:
    """An executor with one answer."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply

    async def run(self, *_: Any) -> Reply:
        return self.reply

    def room(self) -> int | None:
        return None


@pytest.mark.anyio
async def test_a_line_is_known_to_the_engine_while_it_runs() -> None:
    class Noting(Answering):
        async def run(self, *_: Any) -> Reply:
            seen.append(current_line())
            return self.reply

    seen: list[Any] = []
    name = "batch_" + "0a" * 16
    executor = EngineExecutor(Noting(Reply(200, b"{}")), Namespace(errored=False))  # type: ignore[arg-type]
    await executor.run(CHAT, b"{}", {"x-request-id": f"{name}-12"})
    assert (seen, current_line()) == ([(name, 12)], None)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("status", "errored", "leaving", "kept"),
    [
        (200, False, False, True),
        (200, True, False, True),
        (500, False, False, True),
        (500, True, False, False),
        (200, False, True, False),
    ],
)
async def test_a_dead_engines_error_is_held_against_no_line(
    status: int, errored: bool, leaving: bool, kept: bool
) -> None:
    reply = Reply(status, b"{}")
    executor = EngineExecutor(Answering(reply), Namespace(errored=errored))  # type: ignore[arg-type]
    executor.is_leaving = leaving
    assert (await executor.run(CHAT, b"", {})).status_code == (status if kept else 503)
    assert executor.room() == (0 if errored or leaving else None)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("codes", "died"),
    [
        ({}, True),  # it has said that it failed, and its process is about to end
        ({"engine": 1}, True),
        ({"engine": -signal.SIGKILL}, True),
        ({"engine": 0}, False),
        ({"engine": -signal.SIGTERM}, False),
        ({"engine": -signal.SIGSEGV, "other": 0}, True),
        ({"engine": 0, "other": -signal.SIGKILL}, False),  # told to, and did not in time
        (None, False),
    ],
)
async def test_an_engine_that_fails_is_told_from_one_that_was_told_to_end(
    codes: dict[str, int] | None, died: bool
) -> None:
    """`codes`: of its processes that have ended, the first first; None in an API process that
    knows none."""
    manager = None
    if codes is not None:
        failed = next((name for name in list(codes)[:1] if codes[name]), None)
        manager = Namespace(finished_procs=lambda: codes, failed_proc_name=failed)
    client = Namespace(resources=Namespace(engine_manager=manager))
    engine = Namespace(errored=True, engine_core=client)
    executor = EngineExecutor(Answering(Reply(500, b"{}")), engine)  # type: ignore[arg-type]
    reply = await executor.run(CHAT, b"", {})
    assert (reply.status_code, reply.engine_died) == (503, died)


@pytest.mark.anyio
async def test_nobody_knows_how_actors_of_ray_ended() -> None:
    client = Namespace(resources=Namespace(engine_manager=Namespace(failed_proc_name=None)))
    engine = Namespace(errored=True, engine_core=client)
    executor = EngineExecutor(Answering(Reply(500, b"{}")), engine)  # type: ignore[arg-type]
    assert await executor.run(CHAT, b"", {}) == Reply(503, b"")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (b'{"choices":[{"finish_reason":"stop"},{"finish_reason":"abort"}]}', False),
        (b'{"status":"cancelled","output":[]}', False),
        (b'{"choices":[{"finish_reason":"stop","message":{"content":"\\"abort\\""}}]}', True),
        (b'{"choices":[{"finish_reason":"length"}],"metadata":{"x":"abort"}}', True),
        (b'"abort', True),
    ],
)
async def test_only_the_engines_own_word_counts(body: bytes, kept: bool) -> None:
    executor = EngineExecutor(Answering(Reply(200, body)), Stopping(False))  # type: ignore[arg-type]
    assert (await executor.run(CHAT, b"", {})).status_code == (200 if kept else 500)


class Stopping:
    """An engine that answers a question with `answer`, or never and is dead by the next look."""

    def __init__(self, answer: bool | Exception | None) -> None:
        self.errored = False
        self.asked = 0
        self._answer = answer

    async def is_sleeping(self) -> bool:
        self.asked += 1
        if isinstance(self._answer, Exception):
            raise self._answer
        if self._answer is None:
            self.errored = True
            await asyncio.Event().wait()
        return bool(self._answer)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("answer", "kept"), [(False, True), (Exception("Server shutting down"), False), (None, False)]
)
async def test_a_response_counts_if_its_engine_goes_on(
    answer: bool | Exception | None, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_engine, "LOOK_S", 0.01)
    whole = b'{"status":"completed","output":[]}'
    engine = Stopping(answer)
    executor = EngineExecutor(Answering(Reply(200, whole)), engine)  # type: ignore[arg-type]
    assert (await executor.run("/v1/responses", b"", {})).status_code == (200 if kept else 503)
    assert (await executor.run(CHAT, b"", {})).status_code == 200
    assert engine.asked == 1


ABORT = Reply(200, b'{"choices":[{"finish_reason":"abort"}]}')
WHOLE = Reply(200, b'{"status":"completed","output":[]}')


@pytest.mark.anyio
@pytest.mark.parametrize("answer", [True, Exception("Server shutting down"), None])
async def test_an_engine_that_has_stopped_working_aborts_at_no_lines_cost(
    answer: bool | Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paused by another process, told to end, or dead."""
    monkeypatch.setattr(batches_engine, "LOOK_S", 0.01)
    executor = EngineExecutor(Answering(ABORT), Stopping(answer))  # type: ignore[arg-type]
    assert (await executor.run(CHAT, b"", {})).status_code == 503


class Pausing(Answering):
    """The engine is paused and resumed while the request runs."""

    def __init__(self, reply: Reply, engine: Any, mode: str = "abort") -> None:
        super().__init__(reply)
        self.engine, self.mode = engine, mode

    async def run(self, *_: Any) -> Reply:
        await self.engine.pause_generation(mode=self.mode)
        return self.reply


class Pausable(Stopping):
    def __init__(self) -> None:
        super().__init__(False)
        self.modes: list[str] = []

    async def pause_generation(self, mode: str) -> None:
        self.modes.append(mode)


@pytest.mark.anyio
@pytest.mark.parametrize("reply", [ABORT, WHOLE])
async def test_a_pause_counts_against_no_line(reply: Reply) -> None:
    """However soon the engine is resumed. A response that was cut short looks complete."""
    engine = Pausable()
    executor = EngineExecutor(Pausing(reply, engine), engine)  # type: ignore[arg-type]
    url = CHAT if reply is ABORT else batches_engine.RESPONSES
    with before_pauses(engine, executor.pauses):
        assert (await executor.run(url, b"", {})).status_code == 503
    assert engine.modes == ["abort"]
    assert "pause_generation" not in vars(engine)


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ["keep", "wait"])
async def test_what_goes_on_over_a_pause_is_an_answer(mode: str) -> None:
    """Or a loop that pauses again and again would never let a long response end."""
    engine = Pausable()
    executor = EngineExecutor(Pausing(WHOLE, engine, mode), engine)  # type: ignore[arg-type]
    with before_pauses(engine, executor.pauses):
        assert (await executor.run(batches_engine.RESPONSES, b"", {})).status_code == 200
    assert engine.modes == [mode]


@pytest.mark.anyio
async def test_a_line_that_somebody_aborts_is_told_why() -> None:
    executor = EngineExecutor(Answering(ABORT), Stopping(False))  # type: ignore[arg-type]
    reply = await executor.run(CHAT, b"", {})
    assert json.loads(reply.body)["error"]["code"] == "request_aborted"


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        (config(max_num_seqs=128), 144),
        (config("cpu", max_num_seqs=128), 32),
        (config("cpu", max_num_seqs=8), 9),
        (config(max_num_seqs=128, _api_process_count=4), 36),
        (config(max_num_seqs=128, data_parallel_size=2, data_parallel_size_local=1), 288),
        (
            config(
                max_num_seqs=128,
                data_parallel_size=2,
                data_parallel_size_local=1,
                local_engines_only=True,
            ),
            144,
        ),
        (config(max_num_seqs=128, max_num_queued_reqs=40), 10),
        (config(max_num_seqs=128, max_num_queued_reqs=2), 1),
    ],
)
def test_lines_in_flight_fit_the_engine(given: Namespace, lines: int) -> None:
    assert lines_in_flight(given) == lines


def test_what_the_environment_says_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    no_keys = Namespace(api_key=None)
    fitted = fitting_settings(no_keys, config(shutdown_timeout=10))
    assert (fitted.tenant_by_key, fitted.max_in_flight, fitted.drain_s) == (False, 72, 8.0)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert fitting_settings(no_keys, config()).tenant_by_key
    monkeypatch.setenv("CONSERVE_BATCH_TENANT_BY_KEY", "false")
    monkeypatch.setenv("CONSERVE_BATCH_MAX_IN_FLIGHT", "3")
    monkeypatch.setenv("CONSERVE_BATCH_DRAIN_S", "1.5")
    fitted = fitting_settings(no_keys, config())
    assert (fitted.tenant_by_key, fitted.max_in_flight, fitted.drain_s) == (False, 3, 1.5)


@pytest.mark.engine
def test_vllms_config_has_what_is_read() -> None:
    from vllm.config import DeviceConfig, ParallelConfig, SchedulerConfig, VllmConfig

    parallel = ParallelConfig()
    assert parallel._api_process_count == parallel.data_parallel_size == 1
    assert parallel.data_parallel_size_local == 1
    assert parallel.local_engines_only is False
    kinds = (SchedulerConfig, DeviceConfig, VllmConfig)
    names = {each.name for kind in kinds for each in dataclasses.fields(kind)}
    assert {"max_num_seqs", "max_num_queued_reqs", "device_type", "shutdown_timeout"} <= names
