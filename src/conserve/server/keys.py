"""The server's API keys, and whose request one of them makes it."""

from __future__ import annotations

import os
from argparse import Namespace

from fastapi import Request

from conserve.batch.ids import EVERYBODY, tenant_of
from conserve.batch.service import BatchService


def api_keys(args: Namespace) -> list[str]:
    """The keys vLLM's own middleware accepts under /v1; none means that anything passes."""
    return [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]


def tenant_for(service: BatchService, request: Request) -> str:
    """The digest of the request's key, or one tenant for all where keys mean nothing."""
    if not service.settings.tenant_by_key:
        return EVERYBODY
    return tenant_of(request.headers.get("authorization"))
