"""An input file, read line by line in bounded memory: good lines are indexed, bad ones listed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

from conserve.batch.jsonl import num_lead_bytes, request_in, why_not_utf8
from conserve.batch.prefix import prefix_key
from conserve.batch.request_line import (
    WITHOUT_OUTPUT,
    BadLineError,
    Body,
    RequestLine,
    check_body,
    output_tokens,
    parse,
    prompt_of,
)
from conserve.batch.rules import ModelLimits, Rules
from conserve.batch.wire import LineErrorObject

MAX_ERRORS = 100
MAX_CUSTOM_ID = 512
BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class LineIndex:
    """Where a good line's request stands in the file. `line_no` counts from 1."""

    line_no: int
    custom_id: str
    offset: int
    length: int
    prefix_key: str


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
    _unreadable: bool = False
    _seen: set[bytes] = field(default_factory=set)

    @property
    def done_early(self) -> bool:
        """Nothing that follows can change the answer: the file has too many lines, or errors, or
        is no text that can be read."""
        too_many = self.num_lines > self.rules.max_lines or self.num_errors >= MAX_ERRORS
        return self._unreadable or too_many

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
        if self._line_no == 1 and (reason := why_not_utf8(line)):
            self._unreadable = True
            self._refuse(None, "invalid_json_line", f"The file {reason}.")
            return
        request = request_in(line)
        if not too_long and not request:
            return
        self.num_lines += 1
        if self.num_lines > self.rules.max_lines:
            message = f"The input file holds more than {self.rules.max_lines} requests; split it."
            self._refuse(self._line_no, "too_many_requests", message)
            return
        try:
            if too_long:
                limit = self.rules.max_line_bytes
                raise BadLineError("line_too_long", f"The line is longer than {limit} bytes.")
            yield self._check(request, offset + num_lead_bytes(line))
        except BadLineError as error:
            self._refuse(self._line_no, error.code, str(error), error.param)

    def _refuse(self, line: int | None, code: str, message: str, param: str | None = None) -> None:
        self.num_errors += 1
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(LineErrorObject(code=code, message=message, line=line, param=param))

    def _check(self, line: bytes, offset: int) -> LineIndex:
        parsed = parse(line)
        self._check_identity(parsed)
        self._check_model(parsed.body)
        check_body(parsed.body, self.rules.endpoint)
        prompt = prompt_of(parsed.body, self.rules.endpoint)
        expected = output_tokens(parsed.body, self.rules, self._limits(parsed.body))
        # Of vectors and scores all of the line is read: documents stand beside the query.
        num_bytes = len(line) if self.rules.endpoint in WITHOUT_OUTPUT else len(prompt)
        self.estimated_tokens += num_bytes // BYTES_PER_TOKEN + expected
        return LineIndex(self._line_no, parsed.custom_id, offset, len(line), prefix_key(prompt))

    def _check_identity(self, parsed: RequestLine) -> None:
        if not 1 <= len(parsed.custom_id) <= MAX_CUSTOM_ID or "\0" in parsed.custom_id:
            message = f"custom_id must have 1 to {MAX_CUSTOM_ID} characters, none of them NUL."
            raise BadLineError("invalid_custom_id", message, "custom_id")
        if parsed.method != "POST":
            raise BadLineError("invalid_method", "method must be 'POST'.", "method")
        if parsed.url != self.rules.endpoint:
            message = f"url is {parsed.url[:100]!r}; the batch's endpoint is {self.rules.endpoint}."
            raise BadLineError("mismatched_url", message, "url")
        digest = blake2b(parsed.custom_id.encode(), digest_size=16).digest()
        if digest in self._seen:
            message = f"custom_id {parsed.custom_id[:100]!r} is used by an earlier line."
            raise BadLineError("duplicate_custom_id", message, "custom_id")
        self._seen.add(digest)

    def _check_model(self, body: Body) -> None:
        models = self.rules.models
        if models is not None and body.model not in models:
            served = ", ".join(sorted(models)) or "none"
            message = f"The model {body.model[:100]!r} is not served here; served: {served}."
            raise BadLineError("model_not_found", message, "body.model")
        if "\0" in body.model:
            raise BadLineError("model_not_found", "model must not hold NUL.", "body.model")
        self.model = self.model or body.model
        if body.model != self.model:
            message = f"All lines must name one model: {self.model!r}, as the first line does."
            raise BadLineError("mismatched_model", message, "body.model")

    def _limits(self, body: Body) -> ModelLimits:
        return (self.rules.models or {}).get(body.model, ModelLimits())


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
