"""A server of the live page without an engine: its series are what the test says they are."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from conserve.batch.executor import Reply
from conserve.batch.rules import ModelLimits
from conserve.batch.settings import BatchSettings
from conserve.server.batches.routes import batch_service
from conserve.server.dashboard.access import Guard
from conserve.server.dashboard.collector import Collector
from conserve.server.dashboard.messages import Facts, Summary
from conserve.server.dashboard.routes import attach_dashboard
from conserve.server.dashboard.status import Status
from conserve.server.series import narrowed

KEYS = ["first-key", "second-key"]
BOUNDS = (0.1, 0.2, 0.5, 1.0, 2.0)
LABELS = ["model_name", "engine"]
FACTS = Facts("pretend-model", "0.0", 1.0, 0.2, started_s=1000.0, needs_key=True)


class Series:
    """The engine's series in a registry of their own, and a clock that moves when told."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.now_s = 1000.0
        self._made: dict[str, Any] = {}

    def _of(self, kind: Any, name: str, label: str, engine: str, **options: Any) -> Any:
        if name not in self._made:
            names = [*LABELS, "class"] if label else LABELS
            self._made[name] = kind(
                f"conserve:{name}", "-", names, registry=self.registry, **options
            )
        return self._made[name].labels("m", engine, *([label] if label else []))

    def count(self, name: str, amount: float, label: str = "", engine: str = "0") -> None:
        self._of(Counter, name, label, engine).inc(amount)

    def gauge(self, name: str, value: float, label: str = "", engine: str = "0") -> None:
        self._of(Gauge, name, label, engine).set(value)

    def tier(self, name: str, value: float) -> None:
        if name not in self._made:
            names = [*LABELS, "tier"]
            self._made[name] = Gauge(f"conserve:{name}", "-", names, registry=self.registry)
        self._made[name].labels("m", "0", "memory").set(value)

    def observe(self, name: str, *values: float, label: str = "online") -> None:
        for value in values:
            self._of(Histogram, name, label, "0", buckets=BOUNDS).observe(value)

    def collector(self, facts: Facts = FACTS, status: Status | None = None) -> Collector:
        registry = narrowed(self.registry)
        return Collector(registry, facts, status or Status(), lambda: self.now_s)

    async def after(self, collector: Collector, seconds: float = 1.0) -> None:
        self.now_s += seconds
        await collector.look()


def said(collector: Collector) -> Summary:
    """What it says after its first look."""
    assert collector.summary is not None
    return collector.summary


class Waiting:
    """An executor whose lines run until the server ends."""

    async def run(self, url: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        await asyncio.Event().wait()
        raise AssertionError

    async def models(self) -> Mapping[str, ModelLimits] | None:
        return None

    def serves(self, endpoint: str) -> bool:
        return True

    def room(self) -> int | None:
        return None


def dashboard_app(folder: Path, series: Series, keys: Sequence[str] = KEYS) -> FastAPI:
    """Routes of batches and of the page, with a look at the series each tenth of a second."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        settings = BatchSettings(data_dir=folder, poll_s=0.05, tenant_by_key=bool(keys))
        async with batch_service(settings, app, Waiting()) as service:
            collector = series.collector(status=Status(leaving=lambda: app.state.leaving))
            attach_dashboard(app, collector, Guard(keys), service)
            looking = asyncio.create_task(look(series, collector))
            yield
            looking.cancel()

    app = FastAPI(lifespan=lifespan)
    app.state.leaving = False
    return app


async def look(series: Series, collector: Collector) -> None:
    while True:
        await series.after(collector)
        await asyncio.sleep(0.1)


@contextmanager
def served(app: Any, **options: Any) -> Iterator[tuple[str, uvicorn.Server]]:
    """The app on a port of its own, in a thread: its address, and its server. `options` are
    uvicorn's."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none", **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    limit_s = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < limit_s
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"{'https' if server.config.is_ssl else 'http'}://127.0.0.1:{port}", server
    finally:
        if isinstance(app, FastAPI):
            app.state.leaving = True
        server.should_exit = True
        thread.join()
