"""One line of an input file: what is read of it, and what it may ask for.

Bodies are checked, not built: msgspec walks the JSON and keeps only the fields named here, so a
line costs its own bytes and no objects. Of a body, only what no server could know, or would do
otherwise than in a batch, is looked at: its values are for the engine to judge, whose refusal is
that line's error and no other's.
"""

from __future__ import annotations

import codecs
import math
from typing import Any

import msgspec

from conserve.batch.rules import MAX_OUTPUT_TOKENS, ModelLimits, Rules

UTF8_STEP = 65_536
# Completions that an estimate believes of one request: vLLM's own bound.
MAX_N = 16_384

# A field the line does not have.
NOTHING = msgspec.Raw()


class Body(msgspec.Struct):
    model: str
    messages: msgspec.Raw = NOTHING
    prompt: msgspec.Raw = NOTHING
    input: msgspec.Raw = NOTHING
    query: msgspec.Raw = NOTHING
    queries: msgspec.Raw = NOTHING
    text_1: msgspec.Raw = NOTHING
    data_1: msgspec.Raw = NOTHING
    stream: msgspec.Raw = NOTHING
    background: msgspec.Raw = NOTHING
    n: msgspec.Raw = NOTHING
    max_tokens: msgspec.Raw = NOTHING
    max_completion_tokens: msgspec.Raw = NOTHING
    max_output_tokens: msgspec.Raw = NOTHING


class RequestLine(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: Body


class RequestBody(msgspec.Struct):
    """Only the body of a line, every value left as the file spells it."""

    body: dict[str, msgspec.Raw]


PROMPT_FIELDS = {
    "/v1/chat/completions": ("messages",),
    "/v1/completions": ("prompt",),
    "/v1/responses": ("input",),
    "/v1/embeddings": ("input",),
    "/v1/rerank": ("query",),
    "/v1/score": ("text_1", "queries", "data_1"),
}
"""Where a request's prompt stands, or its beginning: in the first of these that it has."""
WITHOUT_OUTPUT = ("/v1/embeddings", "/v1/rerank", "/v1/score")
_decoder = msgspec.json.Decoder(RequestLine)


class BadLineError(Exception):
    """Why a line is refused, as the batch's list of errors has it."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


def parse(line: bytes) -> RequestLine:
    """Raises BadLineError: no UTF-8, no JSON, or fields missing or of another type."""
    try:
        decoder = codecs.getincrementaldecoder("utf-8")()
        for start in range(0, len(line), UTF8_STEP):
            decoder.decode(line[start : start + UTF8_STEP])
        decoder.decode(b"", final=True)
        return _decoder.decode(line)
    except UnicodeDecodeError as error:
        raise BadLineError("invalid_json_line", f"The line is no UTF-8: {error.reason}.") from None
    except msgspec.ValidationError as error:
        raise _missing_or_mistyped(str(error)) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadLineError("invalid_json_line", f"The line is no JSON: {error}.") from None


def _missing_or_mistyped(reason: str) -> BadLineError:
    """msgspec's sentence, with the field it is about as `param`."""
    if "missing required field" in reason:
        name = reason.split("`")[1]
        inside = "$.body" in reason
        param = f"body.{name}" if inside else name
        return BadLineError("missing_required_parameter", f"{param} is missing.", param)
    at = reason.rpartition("`$.")[2].rstrip("`") if "`$." in reason else None
    return BadLineError("invalid_request", reason.rstrip(".") + ".", at)


def prompt_of(body: Body, endpoint: str) -> bytes:
    """As the file spells it; empty where there is none."""
    spelled = (bytes(getattr(body, name)) for name in PROMPT_FIELDS[endpoint])
    return next((prompt for prompt in spelled if prompt not in (b"", b"null")), b"")


def check_body(body: Body, endpoint: str) -> None:
    """Raises BadLineError: nothing to answer, or a way of answering that a batch does not have."""
    if not prompt_of(body, endpoint):
        param = f"body.{PROMPT_FIELDS[endpoint][0]}"
        raise BadLineError("missing_required_parameter", f"{param} is missing.", param)
    for name in ("stream", "background"):
        if bytes(getattr(body, name)) not in (b"", b"null", b"false"):
            message = f"{name} must not be true in a batch; results come in the output file."
            raise BadLineError(f"{name}_not_supported", message, f"body.{name}")


def output_tokens(body: Body, rules: Rules, limits: ModelLimits) -> int:
    """How many the line is expected to take: what lines like it came to, and at most what it asks
    for and what can be."""
    if rules.endpoint in WITHOUT_OUTPUT:
        return 0
    asked = (body.max_completion_tokens, body.max_output_tokens, body.max_tokens)
    wanted = next(filter(None, map(_whole_number, asked)), None)
    mean = rules.mean_output_tokens
    if wanted is None and mean is not None:
        return math.ceil(mean)
    each = min(wanted or rules.default_output_tokens, limits.max_model_len or MAX_OUTPUT_TOKENS)
    most = each * min(_whole_number(body.n) or 1, MAX_N)
    return most if mean is None else min(math.ceil(mean), most)


def _whole_number(value: msgspec.Raw) -> int:
    """The value where it is a number above 0, as 24 or 24.0; 0 for what the engine will judge."""
    try:
        return max(0, int(msgspec.json.decode(value, type=float)))
    except (msgspec.DecodeError, OverflowError):
        return 0


def body_of(line: bytes) -> dict[str, Any]:
    """The request of one validated line: field -> its JSON, as the file spells it."""
    return dict(msgspec.json.decode(line, type=RequestBody).body)
