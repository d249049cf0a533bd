"""Routes of /v1/files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from conserve.batch.errors import NotFoundError
from conserve.batch.service import BatchService
from conserve.batch.wire import ErrorEnvelope, FileDeleted, FileList, FileObject, page
from conserve.server.batches.byte_range import asked_range
from conserve.server.batches.upload import receive
from conserve.server.envelope import ERROR_RESPONSES, EnvelopeRoute
from conserve.server.keys import tenant_for

CONTENT_TYPE = "application/octet-stream; charset=utf-8"
"""Without a charset, clients take the text for Latin-1 or guess."""

UPLOAD_SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "minLength": 1},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": 3600,
                            "maximum": 2_592_000,
                        },
                    },
                }
            }
        },
    }
}


def file_routes(service: BatchService) -> APIRouter:
    router = APIRouter(prefix="/v1/files", route_class=EnvelopeRoute, tags=["files"])

    @router.post("", responses=ERROR_RESPONSES, openapi_extra=UPLOAD_SCHEMA)
    async def upload_file(request: Request) -> FileObject:
        """Upload a file of requests, one JSON object a line."""
        with await service.staging() as staging:
            upload = await receive(
                request, staging, tenant_for(service, request), service.settings.max_file_bytes
            )
            return await service.add_file(upload, staging.path)

    @router.get("", responses=ERROR_RESPONSES, response_model=FileList)
    async def list_files(
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=0, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: Annotated[str | None, Query(pattern="^[a-z_-]{1,32}$")] = None,
    ) -> Response:
        """The caller's files."""
        tenant = tenant_for(service, request)
        objects, more = await service.file_page(tenant, after or None, limit, order, purpose)
        # Ten thousand take so long that chats would stall.
        listed = FileList(**page(objects, more))
        return Response(
            await asyncio.to_thread(listed.model_dump_json), media_type="application/json"
        )

    @router.get("/{file_id}", responses=ERROR_RESPONSES)
    async def retrieve_file(request: Request, file_id: str) -> FileObject:
        """One file's description."""
        return await service.file(tenant_for(service, request), file_id)

    @router.delete("/{file_id}", responses=ERROR_RESPONSES)
    async def delete_file(request: Request, file_id: str) -> FileDeleted:
        """Delete a file no live batch reads."""
        await service.delete_file(tenant_for(service, request), file_id)
        return FileDeleted(id=file_id)

    @router.get(
        "/{file_id}/content",
        responses={
            **ERROR_RESPONSES,
            200: {"content": {CONTENT_TYPE: {}}},
            206: {"content": {CONTENT_TYPE: {}}, "description": "The part that Range names."},
            416: {"model": ErrorEnvelope},
        },
        response_class=StreamingResponse,
    )
    async def file_content(request: Request, file_id: str) -> StreamingResponse:
        """A file's bytes, or those that a Range names."""
        file = await service.file(tenant_for(service, request), file_id)
        etag = f'"{file.id}"'
        span = asked_range(request.headers, file.bytes, etag)
        chunks = await _opened(service.file_content(file, span), file_id)
        return StreamingResponse(
            chunks,
            status_code=200 if span is None else 206,
            media_type=CONTENT_TYPE,
            headers={**_content_headers(file, span), "etag": etag},
        )

    return router


def _content_headers(file: FileObject, span: range | None) -> dict[str, str]:
    headers = {
        "accept-ranges": "bytes",
        "content-disposition": f"attachment; filename*=utf-8''{quote(file.filename)}",
        "content-length": str(file.bytes if span is None else len(span)),
        "x-content-type-options": "nosniff",
    }
    if span is not None:
        headers["content-range"] = f"bytes {span.start}-{span.stop - 1}/{file.bytes}"
    return headers


async def _opened(chunks: AsyncIterator[bytes], file_id: str) -> AsyncIterator[bytes]:
    """The same chunks, with the first at hand: what fails, fails before the answer begins."""
    try:
        first = await anext(chunks, b"")
    except FileNotFoundError:
        raise NotFoundError(f"The content of {file_id!r} is gone.", param="file_id") from None

    async def all_chunks() -> AsyncIterator[bytes]:
        yield first
        async for chunk in chunks:
            yield chunk

    return all_chunks()
