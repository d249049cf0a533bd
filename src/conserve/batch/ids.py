"""Identifiers: what they look like, how they are made, whose they are."""

from __future__ import annotations

import re
from hashlib import sha256
from uuid import uuid4

FILE_ID = re.compile(r"file-[0-9a-f]{32}")
BATCH_ID = re.compile(r"batch_[0-9a-f]{32}")
EVERYBODY = "everybody"


def new_file_id() -> str:
    return f"file-{uuid4().hex}"


def new_batch_id() -> str:
    return f"batch_{uuid4().hex}"


def new_worker_id() -> str:
    return f"worker-{uuid4().hex}"


def tenant_of(authorization: str | None) -> str:
    """Whose request it is: a digest of the bearer key, so that the store holds no key."""
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        return EVERYBODY
    return sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest()
