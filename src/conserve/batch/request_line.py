"""One line of an input file: what is read of it, and what it may ask for.

Bodies are checked, not built: msgspec walks the JSON and keeps only the fields named here, so a
line costs its own bytes and no objects.
"""

from __future__ import annotations

import codecs
from typing import Any

import msgspec

from conserve.batch.rules import ModelLimits, Rules

MAX_N = 16_384
UTF8_STEP = 65_536

# A field the line does not have.
NOTHING = msgspec.Raw()

Count = int | float | None
"""A whole number. 24.0 is one: it is how JavaScript and pandas may spell 24."""


class Body(msgspec.Struct):
    model: str
    messages: msgspec.Raw = NOTHING
    prompt: msgspec.Raw = NOTHING
    input: msgspec.Raw = NOTHING
    stream: bool | None = None
    background: bool | None = None
    n: Count = None
    echo: bool | None = None
    max_tokens: Count = None
    max_completion_tokens: Count = None
    max_output_tokens: Count = None


class RequestLine(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: Body


class RequestBody(msgspec.Struct):
    """Only the body of a line, every value left as the file spells it."""

    body: dict[str, msgspec.Raw]


PROMPT_FIELD = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
    "/v1/responses": "input",
    "/v1/embeddings": "input",
}
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


def check_body(body: Body, rules: Rules, limits: ModelLimits) -> int:
    """Refuse what cannot run; else the output tokens the line is expected to take."""
    if bytes(getattr(body, PROMPT_FIELD[rules.endpoint])) in (b"", b"null"):
        param = f"body.{PROMPT_FIELD[rules.endpoint]}"
        raise BadLineError("missing_required_parameter", f"{param} is missing.", param)
    for name in ("stream", "background"):
        if getattr(body, name):
            message = f"{name} must not be true in a batch; results come in the output file."
            raise BadLineError(f"{name}_not_supported", message, f"body.{name}")
    num_choices = _count(body, "n", MAX_N) or 1
    # A completion of nothing but its prompt, with logprobs, is how texts are scored.
    scores = body.echo and rules.endpoint == "/v1/completions" and body.max_tokens == 0
    asked = [
        _count(body, name, limits.max_model_len)
        for name in ("max_completion_tokens", "max_output_tokens", "max_tokens")
        if not (scores and name == "max_tokens")
    ]
    if rules.endpoint == "/v1/embeddings":
        return 0
    return next(filter(None, asked), rules.default_output_tokens) * num_choices


def _count(body: Body, name: str, most: int | None) -> int | None:
    """The field as a whole number within its bounds, or None where the line leaves it out."""
    value = getattr(body, name)
    if value is None:
        return None
    if value != int(value):
        message = f"{name} must be a whole number."
        raise BadLineError("invalid_request", message, f"body.{name}")
    if value < 1 or (most is not None and value > most):
        bounds = f"from 1 to {most}" if most is not None else "1 or more"
        raise BadLineError("invalid_value", f"{name} must be {bounds}.", f"body.{name}")
    return int(value)


def body_of(line: bytes) -> dict[str, Any]:
    """The request of one validated line: field -> its JSON, as the file spells it."""
    return dict(msgspec.json.decode(line, type=RequestBody).body)
