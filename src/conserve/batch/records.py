"""Rows of the store as the rest of the room sees them: what each was when a store read it.

Times are seconds since the epoch. Structs, since a look at the order of batches makes a record of
each live one, and a frozen dataclass of so many fields takes several times as long to make.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict
from sqlalchemy import Row

from conserve.batch.lifecycle import FileState, Status
from conserve.batch.wire import LineErrorObject


class FileRecord(Struct, frozen=True):
    """A file: the fields are the columns of `files`."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    num_lines: int
    created_at: float
    expires_at: float | None
    state: FileState

    @classmethod
    def from_row(cls, row: Row[Any]) -> FileRecord:
        values = _by_column(row)
        values["state"] = FileState(values["state"])
        return cls(**values)

    def to_row(self) -> dict[str, Any]:
        return asdict(self)


class BatchRecord(Struct, frozen=True):
    """A batch: the fields are the columns of `batches`, and the defaults those of a new one."""

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    completion_window: str
    priority: int
    created_at: float
    expires_at: float
    estimated_tokens: int
    metadata: dict[str, str] | None = None
    output_expires_after_s: int | None = None
    deadline_at: float | None = None
    idempotency_key: str | None = None
    idempotency_digest: str | None = None
    model: str | None = None
    status: Status = Status.VALIDATING
    expiring: bool = False
    owner: str | None = None
    not_before: float = 0.0
    attempts: int = 0
    losses: int = 0
    in_progress_at: float | None = None
    finalizing_at: float | None = None
    completed_at: float | None = None
    failed_at: float | None = None
    expired_at: float | None = None
    cancelling_at: float | None = None
    cancelled_at: float | None = None
    paused_at: float | None = None
    errors: tuple[LineErrorObject, ...] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    has_lines: bool = False

    @property
    def is_to_validate(self) -> bool:
        """Whether its next job is its validation, and not its end."""
        return self.status == Status.VALIDATING and not self.expiring

    @property
    def num_done(self) -> int:
        """Lines that have an answer, good or bad."""
        return self.completed + self.failed

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    @classmethod
    def from_row(cls, row: Row[Any]) -> BatchRecord:
        values = _by_column(row)
        values["status"] = Status(values["status"])
        if values["metadata"] is not None:
            values["metadata"] = json.loads(values["metadata"])
        if values["errors"] is not None:
            values["errors"] = _decode_errors(values["errors"])
        return cls(**values)

    def to_row(self) -> dict[str, Any]:
        encoded = {
            "metadata": None if self.metadata is None else json.dumps(self.metadata),
            "errors": None if self.errors is None else encode_errors(self.errors),
        }
        return {**asdict(self), **encoded}


class LiveBatch(Struct, frozen=True):
    """What the order of batches reads of one: some columns of `batches`."""

    id: str
    tenant: str
    created_at: float
    priority: int
    expires_at: float
    model: str | None
    status: str
    expiring: bool
    estimated_tokens: int
    total: int
    completed: int
    failed: int
    input_tokens: int
    output_tokens: int
    paused_at: float | None


def _by_column(row: Row[Any]) -> dict[str, Any]:
    """Many times as fast as the row's own mapping, which looks each name up in the result."""
    return dict(zip(row._fields, row, strict=True))


def encode_errors(errors: Iterable[LineErrorObject]) -> str:
    """What the column `errors` holds."""
    return json.dumps([error.model_dump() for error in errors])


def _decode_errors(text: str) -> tuple[LineErrorObject, ...]:
    return tuple(LineErrorObject(**error) for error in json.loads(text))


SUSPECT_LOSSES = 2
"""A line that went down with its engine or process so often runs alone: whoever is with it when
that happens again is innocent."""


class Line(Struct, frozen=True):
    """A line to run, and where its request stands in the input file. `line_no` counts from 1."""

    batch_id: str
    line_no: int
    custom_id: str
    offset: int
    length: int
    attempts: int
    losses: int = 0

    @property
    def is_suspect(self) -> bool:
        return self.losses >= SUSPECT_LOSSES


class LineEnd(Struct, frozen=True):
    """What a line came to. `failed` and `payload` are None where it never ran."""

    line_no: int
    custom_id: str
    failed: bool | None
    payload: bytes | None
