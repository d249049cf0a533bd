"""Whose request it is."""

from __future__ import annotations

from fastapi import Request

from conserve.batch.ids import EVERYBODY, tenant_of
from conserve.batch.service import BatchService


def tenant_for(service: BatchService, request: Request) -> str:
    """The digest of the request's key, or one tenant for all where keys mean nothing."""
    if not service.settings.tenant_by_key:
        return EVERYBODY
    return tenant_of(request.headers.get("authorization"))
