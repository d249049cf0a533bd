"""Routes below /dashboard."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from conserve.batch.service import BatchService
from conserve.server.dashboard.access import PAGE_HEADERS, Guard
from conserve.server.dashboard.collector import Collector
from conserve.server.dashboard.feed import BatchLists, stream
from conserve.server.envelope import EnvelopeRoute
from conserve.server.keys import tenant_for

PAGE = "index.html"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
FEED_HEADERS = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "x-accel-buffering": "no",  # nginx would hold events back
}


def page_files() -> dict[str, bytes]:
    """The page and all it loads, by name. It names no other place."""
    folder = files("conserve.server.dashboard").joinpath("page")
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def attach_dashboard(
    app: FastAPI, collector: Collector, guard: Guard, service: BatchService | None
) -> None:
    """Put the page and its feed on an app. The page holds no figures; the feed is guarded."""
    router = APIRouter(prefix="/dashboard", route_class=EnvelopeRoute, include_in_schema=False)
    parts = page_files()
    batches = BatchLists(service) if service is not None else None

    @router.get("")
    async def page() -> Response:
        return _file(parts, PAGE)

    @router.get("/feed")
    async def feed(request: Request) -> Response:
        guard.check(request)
        tenant = tenant_for(service, request) if service is not None else ""
        events = stream(collector, batches, tenant)
        return StreamingResponse(events, media_type="text/event-stream", headers=FEED_HEADERS)

    @router.get("/{name}")
    async def part(name: str) -> Response:
        return _file(parts, name)

    app.include_router(router)


def _file(parts: dict[str, bytes], name: str) -> Response:
    kind = KINDS.get(name[name.rfind(".") :])
    if name not in parts or kind is None:
        return Response(status_code=404)
    return Response(parts[name], media_type=kind, headers=PAGE_HEADERS)
