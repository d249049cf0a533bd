"""Who may watch, and what a browser may do with the page."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import sha256

from fastapi import Request

from conserve.batch.errors import BatchError

PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class UnauthorizedError(BatchError):
    """No key, or none of the server's."""

    status_code = 401
    code = "invalid_api_key"


class Guard:
    """Passes requests that carry one of the server's keys; every request where it has none."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def check(self, request: Request) -> None:
        """Raises UnauthorizedError."""
        if not self._digests:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        digest = sha256(key.encode()).digest()
        known = [hmac.compare_digest(digest, each) for each in self._digests]
        if scheme.lower() != "bearer" or not any(known):
            raise UnauthorizedError(
                "This server wants one of its API keys, as `Authorization: Bearer KEY`."
            )
