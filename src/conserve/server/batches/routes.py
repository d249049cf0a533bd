"""Routes of /v1/batches, and the batch service around an app."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import APIRouter, FastAPI, Header, Query, Request

from conserve import __version__
from conserve.batch.executor import Executor
from conserve.batch.service import BatchService
from conserve.batch.settings import BatchSettings
from conserve.batch.wire import BatchCreate, BatchList, BatchObject, page
from conserve.server.batches.file_routes import file_routes
from conserve.server.batches.usage_routes import usage_routes
from conserve.server.envelope import ERROR_RESPONSES, EnvelopeRoute
from conserve.server.keys import tenant_for


def batch_routes(service: BatchService) -> APIRouter:
    router = APIRouter(prefix="/v1/batches", route_class=EnvelopeRoute, tags=["batches"])

    @router.post("", responses=ERROR_RESPONSES)
    async def create_batch(
        request: Request,
        body: BatchCreate,
        idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
    ) -> BatchObject:
        """Start a batch; with an Idempotency-Key, once however often it is sent."""
        return await service.create_batch(tenant_for(service, request), body, idempotency_key)

    @router.get("", responses=ERROR_RESPONSES)
    async def list_batches(
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=0, le=100)] = 20,
    ) -> BatchList:
        """The caller's batches, newest first."""
        objects, more = await service.batch_page(tenant_for(service, request), after or None, limit)
        return BatchList(**page(objects, more))

    @router.get("/{batch_id}", responses=ERROR_RESPONSES)
    async def retrieve_batch(request: Request, batch_id: str) -> BatchObject:
        """One batch."""
        return await service.batch(tenant_for(service, request), batch_id)

    @router.post("/{batch_id}/cancel", responses=ERROR_RESPONSES)
    async def cancel_batch(request: Request, batch_id: str) -> BatchObject:
        """Stop a batch that has not ended, and keep what it has."""
        return await service.cancel_batch(tenant_for(service, request), batch_id)

    @router.post("/{batch_id}/pause", responses=ERROR_RESPONSES)
    async def pause_batch(request: Request, batch_id: str) -> BatchObject:
        """Start no more lines of a batch until it is resumed; its deadline stays."""
        return await service.pause_batch(tenant_for(service, request), batch_id)

    @router.post("/{batch_id}/resume", responses=ERROR_RESPONSES)
    async def resume_batch(request: Request, batch_id: str) -> BatchObject:
        """Go on with a paused batch."""
        return await service.resume_batch(tenant_for(service, request), batch_id)

    return router


def attach_batches(app: FastAPI, service: BatchService) -> None:
    """Put the routes of files, batches and usage on an app, whose OpenAPI then says whose they are;
    nothing runs yet."""
    app.title, app.version = "ConServe", __version__
    app.include_router(file_routes(service))
    app.include_router(batch_routes(service))
    app.include_router(usage_routes(service))


@asynccontextmanager
async def batch_service(
    settings: BatchSettings,
    app: FastAPI,
    executor: Executor,
    clock: Callable[[], float] = time.time,
) -> AsyncIterator[BatchService]:
    """Routes on `app`, and the work behind them, for as long as the block runs.

    To be entered once for each process that serves `app`, before its first request. A database
    that is away is no error here: the routes answer 503 and the work begins when it is back. On
    exit lines in flight have `drain_s` to end; then leases are given back. Stop sooner with
    `service.stop()`, while the engine still answers.
    """
    service = BatchService(settings, executor, clock)
    attach_batches(app, service)
    app.state.batch_service = service
    async with service:
        yield service


def service_of(app: FastAPI) -> BatchService | None:
    """The service whose routes the app has, if any."""
    return getattr(app.state, "batch_service", None)
