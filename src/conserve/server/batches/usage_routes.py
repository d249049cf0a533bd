"""The route of /v1/usage: what a key's requests of every class came to."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from conserve.batch.service import BatchService
from conserve.batch.wire import RequestClass, UsageList
from conserve.server.envelope import ERROR_RESPONSES, EnvelopeRoute
from conserve.server.keys import tenant_for


def usage_routes(service: BatchService) -> APIRouter:
    router = APIRouter(prefix="/v1/usage", route_class=EnvelopeRoute, tags=["usage"])

    @router.get("", responses=ERROR_RESPONSES)
    async def usage(
        request: Request,
        days: Annotated[int, Query(ge=1, le=3660)] = 31,
        request_class: RequestClass | None = None,
    ) -> UsageList:
        """What the caller's requests came to by day, class and model, the oldest first; what had
        none is left out."""
        tenant = tenant_for(service, request)
        return UsageList(data=await service.usage(tenant, days, request_class))

    return router
