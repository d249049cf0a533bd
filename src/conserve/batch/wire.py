"""The types that go over the wire, as OpenAI has them, and our extensions at the top level."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
)

Endpoint = Literal[
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/rerank",
    "/v1/score",
]
ENDPOINTS: tuple[str, ...] = get_args(Endpoint)

DURATION = re.compile(r"([1-9][0-9]{0,8})(s|m|h|d)")
UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
MAX_WINDOW_S = 30 * 86_400
MAX_MOMENT = 64
NO_NUL = r"^[^\x00]*$"

MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=NO_NUL)]
MetadataValue = Annotated[str, StringConstraints(max_length=512, pattern=NO_NUL)]


def duration_s(word: str) -> int:
    """Seconds of a duration such as `24h`, `30m`, `90s` or `7d`.

    Raises:
        ValueError: no duration, or longer than 30 days.
    """
    match = DURATION.fullmatch(word)
    if not match:
        raise ValueError("must be a whole number and a unit, such as '24h', '30m', '90s' or '7d'")
    seconds = int(match[1]) * UNIT_S[match[2]]
    if seconds > MAX_WINDOW_S:
        raise ValueError("must be 30 days at most")
    return seconds


def deadline_time(word: str | int | float, now_s: float) -> float:
    """The moment a `deadline` names, in seconds since the epoch: a duration from now, a Unix time,
    or an ISO 8601 time with its offset.

    Raises:
        ValueError: none of these, in the past, or more than 30 days away.
    """
    if isinstance(word, str):
        if DURATION.fullmatch(word):
            return now_s + duration_s(word)
        try:
            moment = datetime.fromisoformat(word)
        except ValueError:
            raise ValueError(
                "must be a duration ('2h'), a Unix time in seconds, or an ISO 8601 time"
            ) from None
        if moment.tzinfo is None:
            raise ValueError("must name its offset from UTC, as in '2030-01-31T12:00:00Z'")
        word = moment.timestamp()
    if not now_s < word <= now_s + MAX_WINDOW_S:
        raise ValueError("must be in the future, and within 30 days")
    return float(word)


def _may_be_a_moment(word: Any) -> Any:
    """What `deadline_time` judges. Of another type the field is named here, and of an endless word:
    pydantic would name each type that it is not."""
    is_number = isinstance(word, int | float) and not isinstance(word, bool)
    if word is None or is_number or (isinstance(word, str) and len(word) <= MAX_MOMENT):
        return word
    raise ValueError("must be a duration ('2h'), a Unix time in seconds, or an ISO 8601 time")


class OutputExpiresAfter(BaseModel):
    """When the output files go, counted from when they are made."""

    model_config = ConfigDict(strict=True)
    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000)


class BatchCreate(BaseModel):
    """Body of POST /v1/batches; unknown fields are refused, so that no wish is quietly ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)
    input_file_id: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    endpoint: Endpoint
    completion_window: str
    metadata: dict[MetadataKey, MetadataValue] | None = Field(default=None, max_length=16)
    output_expires_after: OutputExpiresAfter | None = None
    deadline: Annotated[
        Annotated[str, StringConstraints(max_length=MAX_MOMENT)] | int | float | None,
        BeforeValidator(_may_be_a_moment),
    ] = None
    strict_deadline: bool = False
    priority: int = Field(default=10, ge=1, le=1_000_000)

    @field_validator("completion_window")
    @classmethod
    def _is_duration(cls, word: str) -> str:
        duration_s(word)
        return word


class LineErrorObject(BaseModel):
    """One reason why the input file was refused; `line` counts from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class ErrorList(BaseModel):
    object: Literal["list"] = "list"
    data: list[LineErrorObject]


class RequestCounts(BaseModel):
    """completed + failed <= total; the rest has not run, or never will."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class InputTokensDetails(BaseModel):
    cached_tokens: int = 0


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int = 0


class Usage(BaseModel):
    input_tokens: int = 0
    input_tokens_details: InputTokensDetails = InputTokensDetails()
    output_tokens: int = 0
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int = 0


DeadlineState = Literal["unknown", "on_track", "at_risk", "will_miss", "met", "missed"]


class BatchObject(BaseModel):
    """A batch. What follows `usage` is ours: OpenAI's clients pass unknown fields through."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None = None
    errors: ErrorList | None = None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    metadata: dict[str, str] | None = None
    usage: Usage
    priority: int
    paused_at: int | None = None
    deadline: int | None = None
    deadline_state: DeadlineState
    progress: float
    tokens_per_second: float | None = None
    estimated_finish_at: int | None = None


RequestClass = Literal["online", "flex", "batch"]


class UsageDay(BaseModel):
    """What one key's requests of a class and a model came to on one day of UTC."""

    object: Literal["usage.day"] = "usage.day"
    date: str
    request_class: RequestClass
    model: str | None
    completed: int
    failed: int
    usage: Usage


class UsageList(BaseModel):
    object: Literal["list"] = "list"
    data: list[UsageDay]


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchList(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """What every error answers; OpenAI's clients raise their exceptions from it."""

    error: ErrorBody


def page(objects: list[Any], has_more: bool) -> dict[str, Any]:
    """Fields of a list page around `objects`. An empty page is the last one: it names no id to go
    on from."""
    return {
        "data": objects,
        "first_id": objects[0].id if objects else None,
        "last_id": objects[-1].id if objects else None,
        "has_more": has_more and bool(objects),
    }
