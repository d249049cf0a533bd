"""OpenAI's error envelope for our routes, whatever app they are mounted on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any
from uuid import uuid4

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from conserve.batch.errors import BatchError, InvalidRequestError
from conserve.batch.wire import ErrorEnvelope
from conserve.server.asgi import Message, Receive
from conserve.server.pages import check_page

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
MAX_BODY_BYTES = 1024 * 1024
"""Of a JSON body; the largest that means something has some tens of kilobytes."""
# For the route's description: every status an error may have, and its body.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorEnvelope} for status in (400, 401, 403, 404, 413, 429, 503)
}


class EnvelopeRoute(APIRoute):
    """Answers our own pages and programs, each error as OpenAI does, and with a request id."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            if self.body_field is not None:
                request = Request(request.scope, _bounded(request.receive))
            request_id = request.headers.get(REQUEST_ID, "")[:128] or f"req_{uuid4().hex}"
            try:
                await check_page(request)
                response = await handle(request)
            except BatchError as error:
                response = envelope(error)
            except (RequestValidationError, ValidationError) as error:
                response = envelope(from_validation(error.errors()))
            except ClientDisconnect:
                response = Response(status_code=499)  # nobody is there to read it
            except HTTPException as error:
                response = envelope(_from_http(error))
            except Exception:
                logger.exception("request %s failed", request_id)
                response = envelope(_OurFaultError("Internal error; see the server's log."))
            if not _vllm_names(request):
                response.headers.setdefault(REQUEST_ID, request_id)
            return response

        return answer


def _vllm_names(request: Request) -> bool:
    """Whether vLLM adds a request id to every response: of two, clients would make one of both."""
    args = getattr(request.app.state, "args", None)
    return bool(getattr(args, "enable_request_id_headers", False))


def _bounded(receive: Receive) -> Receive:
    """`receive` of a request whose body FastAPI reads into memory."""
    num_bytes = 0

    async def counted() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > MAX_BODY_BYTES:
            # The one exception that FastAPI passes on while it reads.
            raise HTTPException(413, f"The body must have {MAX_BODY_BYTES} bytes at most.")
        return message

    return counted


class _OurFaultError(BatchError):
    status_code = 500
    code = "internal_error"


def _from_http(error: HTTPException) -> BatchError:
    named = InvalidRequestError(str(error.detail), code="invalid_request")
    named.status_code = error.status_code
    return named


def envelope(error: BatchError) -> JSONResponse:
    """The answer for a named error."""
    headers = dict(error.headers)
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    body = {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
    }
    return JSONResponse({"error": body}, status_code=error.status_code, headers=headers)


def from_validation(errors: Sequence[Any]) -> InvalidRequestError:
    """pydantic's first complaint, as one sentence that names the field."""
    first = errors[0]
    path = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    param = None if first["type"] == "json_invalid" else ".".join(path) or None
    reason = first["msg"].removeprefix("Value error, ")
    if not path and first["type"] == "model_attributes_type":
        reason = "must be a JSON object, sent with content-type: application/json"
    code = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}.get(
        first["type"], "invalid_value"
    )
    message = f"{param or 'body'}: {reason}."
    return InvalidRequestError(message, code=code, param=param)
