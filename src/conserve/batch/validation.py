"""Reads an input file line by line in bounded memory: an index of good lines, a list of bad ones.

Bodies are checked, not built: msgspec walks the JSON and keeps only the fields named here, so a
line costs its own bytes and no objects.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import msgspec

from conserve.batch.prefix import prefix_key
from conserve.batch.wire import LineErrorObject

# Of one file and one line, where the settings say nothing else.
MAX_LINES = 50_000
MAX_LINE_BYTES = 16 * 1024 * 1024
# Assumed of a line that names no maximum.
OUTPUT_TOKENS = 256
MAX_ERRORS = 100
MAX_CUSTOM_ID = 512
MAX_N = 16_384
BYTES_PER_TOKEN = 4
UTF8_STEP = 65_536


@dataclass(frozen=True)
class ModelLimits:
    """What one served model can give; None where the server does not say."""

    max_model_len: int | None = None


@dataclass(frozen=True)
class Rules:
    """What a file must be: where its lines go, which models are there, and how much is allowed.

    `models` is None when the server names none; then any model passes.
    """

    endpoint: str
    models: Mapping[str, ModelLimits] | None = None
    max_lines: int = MAX_LINES
    max_line_bytes: int = MAX_LINE_BYTES
    default_output_tokens: int = OUTPUT_TOKENS


@dataclass(frozen=True, slots=True)
class LineIndex:
    """Where a good line's request stands in the file. `line_no` counts from 1."""

    line_no: int
    custom_id: str
    offset: int
    length: int
    prefix_key: str


# A field the line does not have.
NOTHING = msgspec.Raw()


class _Body(msgspec.Struct):
    model: str
    messages: msgspec.Raw = NOTHING
    prompt: msgspec.Raw = NOTHING
    input: msgspec.Raw = NOTHING
    stream: bool | None = None
    background: bool | None = None
    n: int | None = None
    echo: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None


class _Line(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: _Body


class RequestBody(msgspec.Struct):
    """Only the body of a line, every value left as the file spells it."""

    body: dict[str, msgspec.Raw]


PROMPT_FIELD = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
    "/v1/responses": "input",
    "/v1/embeddings": "input",
}
_decoder = msgspec.json.Decoder(_Line)


class _BadLineError(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


@dataclass
class Validation:
    """One pass over one file. Feed chunks in order, then finish; read the totals at the end."""

    rules: Rules
    errors: list[LineErrorObject] = field(default_factory=list)
    num_lines: int = 0
    num_errors: int = 0
    model: str | None = None
    estimated_tokens: int = 0
    _line_no: int = 0
    _offset: int = 0
    _rest: bytearray = field(default_factory=bytearray)
    _skipping: bool = False
    _seen: set[bytes] = field(default_factory=set)

    @property
    def done_early(self) -> bool:
        """Nothing that follows can change the answer: the file has too many lines, or errors."""
        return self.num_lines > self.rules.max_lines or self.num_errors >= MAX_ERRORS

    def feed(self, chunk: bytes) -> Iterator[LineIndex]:
        """Good lines that end in this chunk."""
        start = 0
        while not self.done_early:
            end = chunk.find(b"\n", start)
            if end < 0:
                self._keep(chunk[start:])
                return
            yield from self._end_line(chunk[start:end], 1)
            start = end + 1

    def finish(self) -> Iterator[LineIndex]:
        """The last line, where no newline ends it; then the verdicts on the whole file."""
        if self._rest or self._skipping:
            yield from self._end_line(b"", 0)
        if self.num_lines == 0 and self.num_errors == 0:
            self._refuse(None, "empty_file", "The input file holds no request.")

    def _keep(self, part: bytes) -> None:
        if self._skipping:
            self._offset += len(part)
        elif len(self._rest) + len(part) > self.rules.max_line_bytes:
            self._offset += len(self._rest) + len(part)
            self._rest.clear()
            self._skipping = True
        else:
            self._rest += part

    def _end_line(self, tail: bytes, newline: int) -> Iterator[LineIndex]:
        self._keep(tail)
        line = bytes(self._rest)
        offset, self._offset = self._offset, self._offset + len(line) + newline
        self._rest.clear()
        self._line_no += 1
        too_long, self._skipping = self._skipping, False
        if not too_long and not line.strip():
            return
        self.num_lines += 1
        if self.num_lines > self.rules.max_lines:
            message = f"The input file holds more than {self.rules.max_lines} requests; split it."
            self._refuse(self._line_no, "too_many_requests", message)
            return
        try:
            if too_long:
                limit = self.rules.max_line_bytes
                raise _BadLineError("line_too_long", f"The line is longer than {limit} bytes.")
            yield self._check(line, offset)
        except _BadLineError as error:
            self._refuse(self._line_no, error.code, str(error), error.param)

    def _refuse(self, line: int | None, code: str, message: str, param: str | None = None) -> None:
        self.num_errors += 1
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(LineErrorObject(code=code, message=message, line=line, param=param))

    def _check(self, line: bytes, offset: int) -> LineIndex:
        parsed = _parse(line)
        self._check_identity(parsed)
        self._check_model(parsed.body)
        output_tokens = _check_body(parsed.body, self.rules, self._limits(parsed.body))
        prompt = memoryview(getattr(parsed.body, PROMPT_FIELD[self.rules.endpoint]))
        self.estimated_tokens += len(prompt) // BYTES_PER_TOKEN + output_tokens
        return LineIndex(self._line_no, parsed.custom_id, offset, len(line), prefix_key(prompt))

    def _check_identity(self, parsed: _Line) -> None:
        if not 1 <= len(parsed.custom_id) <= MAX_CUSTOM_ID or "\0" in parsed.custom_id:
            message = f"custom_id must have 1 to {MAX_CUSTOM_ID} characters, none of them NUL."
            raise _BadLineError("invalid_custom_id", message, "custom_id")
        if parsed.method != "POST":
            raise _BadLineError("invalid_method", "method must be 'POST'.", "method")
        if parsed.url != self.rules.endpoint:
            message = f"url is {parsed.url[:100]!r}; the batch's endpoint is {self.rules.endpoint}."
            raise _BadLineError("mismatched_url", message, "url")
        digest = blake2b(parsed.custom_id.encode(), digest_size=16).digest()
        if digest in self._seen:
            message = f"custom_id {parsed.custom_id[:100]!r} is used by an earlier line."
            raise _BadLineError("duplicate_custom_id", message, "custom_id")
        self._seen.add(digest)

    def _check_model(self, body: _Body) -> None:
        models = self.rules.models
        if models is not None and body.model not in models:
            served = ", ".join(sorted(models)) or "none"
            message = f"The model {body.model[:100]!r} is not served here; served: {served}."
            raise _BadLineError("model_not_found", message, "body.model")
        if "\0" in body.model:
            raise _BadLineError("model_not_found", "model must not hold NUL.", "body.model")
        self.model = self.model or body.model
        if body.model != self.model:
            message = f"All lines must name one model: {self.model!r}, as the first line does."
            raise _BadLineError("mismatched_model", message, "body.model")

    def _limits(self, body: _Body) -> ModelLimits:
        return (self.rules.models or {}).get(body.model, ModelLimits())


def _parse(line: bytes) -> _Line:
    try:
        decoder = codecs.getincrementaldecoder("utf-8")()
        for start in range(0, len(line), UTF8_STEP):
            decoder.decode(line[start : start + UTF8_STEP])
        decoder.decode(b"", final=True)
        return _decoder.decode(line)
    except UnicodeDecodeError as error:
        raise _BadLineError("invalid_json_line", f"The line is no UTF-8: {error.reason}.") from None
    except msgspec.ValidationError as error:
        raise _missing_or_mistyped(str(error)) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise _BadLineError("invalid_json_line", f"The line is no JSON: {error}.") from None


def _missing_or_mistyped(reason: str) -> _BadLineError:
    """msgspec's sentence, with the field it is about as `param`."""
    if "missing required field" in reason:
        name = reason.split("`")[1]
        inside = "$.body" in reason
        param = f"body.{name}" if inside else name
        return _BadLineError("missing_required_parameter", f"{param} is missing.", param)
    at = reason.rpartition("`$.")[2].rstrip("`") if "`$." in reason else None
    return _BadLineError("invalid_request", reason.rstrip(".") + ".", at)


def _check_body(body: _Body, rules: Rules, limits: ModelLimits) -> int:
    """Refuse what cannot run; else the output tokens the line is expected to take."""
    if bytes(getattr(body, PROMPT_FIELD[rules.endpoint])) in (b"", b"null"):
        param = f"body.{PROMPT_FIELD[rules.endpoint]}"
        raise _BadLineError("missing_required_parameter", f"{param} is missing.", param)
    for name in ("stream", "background"):
        if getattr(body, name):
            message = f"{name} must not be true in a batch; results come in the output file."
            raise _BadLineError(f"{name}_not_supported", message, f"body.{name}")
    _check_range(body, "n", MAX_N)
    # A completion of nothing but its prompt, with logprobs, is how texts are scored.
    scores = body.echo and rules.endpoint == "/v1/completions" and body.max_tokens == 0
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if not (scores and name == "max_tokens"):
            _check_range(body, name, limits.max_model_len)
    if rules.endpoint == "/v1/embeddings":
        return 0
    asked = body.max_completion_tokens or body.max_output_tokens or body.max_tokens
    return (asked or rules.default_output_tokens) * (body.n or 1)


def _check_range(body: _Body, name: str, most: int | None) -> None:
    value = getattr(body, name)
    if value is not None and (value < 1 or (most is not None and value > most)):
        bounds = f"from 1 to {most}" if most is not None else "1 or more"
        raise _BadLineError("invalid_value", f"{name} must be {bounds}.", f"body.{name}")


def validate(chunks: Iterable[bytes], rules: Rules) -> Validation:
    """The verdict on a whole file at hand; the good lines are dropped as they pass."""
    validation = Validation(rules)
    for chunk in chunks:
        for _line in validation.feed(chunk):
            pass
        if validation.done_early:
            return validation
    for _line in validation.finish():
        pass
    return validation


def body_of(line: bytes) -> dict[str, Any]:
    """The request of one validated line: field -> its JSON, as the file spells it."""
    return dict(msgspec.json.decode(line, type=RequestBody).body)
