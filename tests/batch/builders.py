"""One way to make a line, an input file and a batch, for every test of this room."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final
from uuid import uuid4

import openai

from conserve.batch.file_store import BATCH, Upload
from conserve.batch.records import BatchRecord, FileRecord
from conserve.batch.stores import Stores
from conserve.batch.wire import BatchCreate

CHAT: Final = "/v1/chat/completions"
MODEL = "fake"
TENANT = "t"


def line(custom_id: str, prompt: str = "hello", **changes: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}]}
    body |= changes.pop("body", {})
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body, **changes}


def jsonl(lines: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


def numbered(count: int) -> bytes:
    return jsonl([line(f"request-{n}", f"prompt {n}") for n in range(count)])


def batch_body(file_id: str, **changes: Any) -> dict[str, Any]:
    """Body of POST /v1/batches: over chat completions, and a day long."""
    wishes = {"endpoint": CHAT, "completion_window": "24h"}
    return {"input_file_id": file_id, **wishes, **changes}


def submit(client: openai.OpenAI, content: bytes, **changes: Any) -> str:
    """Id of a batch over a new file."""
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(**batch_body(file.id, **changes)).id


async def stored_file(stores: Stores, content: bytes, tenant: str = TENANT) -> FileRecord:
    staged = stores.contents.staging_dir / f"staged-{uuid4().hex}"
    staged.write_bytes(content)
    upload = Upload(tenant, "in.jsonl", BATCH, len(content), content.count(b"\n"))
    return await stores.files.add(upload, staged)


async def stored_batch(
    stores: Stores, file: FileRecord, key: str | None = None, **changes: Any
) -> BatchRecord:
    """A batch of the file's owner, waiting to be validated."""
    request = BatchCreate(**batch_body(file.id, **changes))
    return await stores.batches.create(file.tenant, request, key, estimated_tokens=100)
