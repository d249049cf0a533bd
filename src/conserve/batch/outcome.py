"""From a line to its offline request, and from the answer to a line of the output or error file."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

import msgspec

from conserve.batch.executor import Reply
from conserve.batch.one_line import on_one_line
from conserve.batch.records import Line
from conserve.batch.request_line import body_of

# The engine is full or restarting: the line waits, and nothing is held against it.
OVERLOAD = frozenset({429, 503})
# Believed of one answer.
MAX_TOKENS = 2**31 - 1
# The server's own fault, which another try may not meet again.
RETRIABLE = frozenset({408, 500, 502, 504})


@dataclass(frozen=True, slots=True)
class Tokens:
    """Usage of one or many requests, counted as the Responses API names it."""

    input: int = 0
    cached: int = 0
    output: int = 0
    reasoning: int = 0

    @property
    def total(self) -> int:
        return self.input + self.output

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(
            self.input + other.input,
            self.cached + other.cached,
            self.output + other.output,
            self.reasoning + other.reasoning,
        )


@dataclass(frozen=True, slots=True)
class Result:
    """A line of the output file, or of the error file when `failed`."""

    line: Line
    failed: bool
    payload: bytes
    tokens: Tokens = Tokens()


@dataclass(frozen=True, slots=True)
class Postponed:
    """A line that goes back to wait. `counted` when the try counts against its bound."""

    line: Line
    not_before: float
    counted: bool
    losses: int = 0
    """How many losses of its process this is worth."""


Outcome = Result | Postponed


class _Details(msgspec.Struct):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    input_tokens: int | None = None
    completion_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _Answer(msgspec.Struct):
    usage: _Usage | None = None


def request_id(batch_id: str, line_no: int) -> str:
    """Id of a line: the same however often, and wherever, the line is run."""
    return "batch_req_" + sha256(f"{batch_id}:{line_no}".encode()).hexdigest()[:32]


def engine_id(line: Line) -> str:
    """What the engine is asked to call the line's request: in its log, its spans, its answer."""
    return f"{line.batch_id}-{line.line_no}"


def offline_body(text: bytes, priority: int, response_id: str | None = None) -> bytes:
    """The request of an input line, marked as offline work; what the line says of its own class
    does not count. `response_id` is what /v1/responses, which reads no header, is to call it."""
    body = body_of(text)
    if response_id is not None:
        body["request_id"] = msgspec.Raw(msgspec.json.encode(response_id))
    body["service_tier"] = msgspec.Raw(b'"flex"')
    body["priority"] = msgspec.Raw(str(priority).encode())
    body.pop("stream", None)
    body.pop("stream_options", None)
    return msgspec.json.encode(body)


def from_reply(line: Line, reply: Reply) -> Result | None:
    """What the answer means for the output; None when it is the server's fault and no line yet."""
    if reply.status_code in OVERLOAD or reply.status_code in RETRIABLE:
        return None
    return keep_reply(line, reply)


def keep_reply(line: Line, reply: Reply) -> Result:
    """The answer as a line of output, whatever it says."""
    body = _one_line(reply.body)
    if body is None:
        return failure(line, "invalid_response", f"HTTP {reply.status_code}, and no JSON in it.")
    response = {
        "status_code": reply.status_code,
        "request_id": reply.request_id or request_id(line.batch_id, line.line_no),
        "body": msgspec.Raw(body),
    }
    failed = not 200 <= reply.status_code < 300
    return Result(line, failed, _encode(line, response, None), _tokens(body))


def failure(line: Line, code: str, message: str) -> Result:
    """A line of the error file for a request that has no answer."""
    return Result(line, True, _encode(line, None, {"code": code, "message": message}))


def never_ran(batch_id: str, line_no: int, custom_id: str, code: str) -> bytes:
    """A line of the error file for a request that was never run: batch_expired, batch_cancelled."""
    reason = {
        "batch_expired": "This request could not be executed before the batch expired.",
        "batch_cancelled": "This request was not executed before the batch was cancelled.",
    }[code]
    line = Line(batch_id, line_no, custom_id, 0, 0, 0)
    return _encode(line, None, {"code": code, "message": reason})


def _encode(line: Line, response: object, error: object) -> bytes:
    return on_one_line(
        msgspec.json.encode(
            {
                "id": request_id(line.batch_id, line.line_no),
                "custom_id": line.custom_id,
                "response": response,
                "error": error,
            }
        )
    )


def _one_line(body: bytes) -> bytes | None:
    """The same JSON without newlines; None where it is no JSON."""
    try:
        body.decode()
        msgspec.json.decode(body, type=msgspec.Raw)
        return msgspec.json.format(body, indent=-1) if b"\n" in body else body
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _tokens(body: bytes) -> Tokens:
    try:
        usage = msgspec.json.decode(body, type=_Answer).usage or _Usage()
    except (msgspec.DecodeError, RecursionError):
        return Tokens()
    read = usage.prompt_tokens_details or usage.input_tokens_details or _Details()
    wrote = usage.completion_tokens_details or usage.output_tokens_details or _Details()
    return Tokens(
        input=_bounded(usage.prompt_tokens or usage.input_tokens),
        cached=_bounded(read.cached_tokens),
        output=_bounded(usage.completion_tokens or usage.output_tokens),
        reasoning=_bounded(wrote.reasoning_tokens),
    )


def _bounded(count: int | None) -> int:
    """What a server says, as far as sums of it fit the database's integers."""
    return min(max(0, count or 0), MAX_TOKENS)
