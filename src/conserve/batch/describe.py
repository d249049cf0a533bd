"""From a row to the batch its owner sees."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import RowMapping

from conserve.batch import deadlines
from conserve.batch.lifecycle import TERMINAL, Status
from conserve.batch.wire import (
    BatchObject,
    DeadlineState,
    ErrorList,
    InputTokensDetails,
    OutputTokensDetails,
    RequestCounts,
    Usage,
)

TIMES = (
    "created_at",
    "in_progress_at",
    "expires_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)


@dataclass(frozen=True)
class Outlook:
    """What the future is read from: the moment, the harvest, and all live batches in order."""

    now_s: float
    harvest: deadlines.Harvest
    ordered: Sequence[deadlines.BatchView]


def batch_object(row: RowMapping, outlook: Outlook) -> BatchObject:
    times = {name: int(row[name]) if row[name] is not None else None for name in TIMES}
    done = row["completed"] + row["failed"]
    finish_at, deadline_state = _future(row, outlook)
    return BatchObject.model_validate(
        {
            **{name: row[name] for name in PLAIN},
            **times,
            "errors": _errors(row),
            "request_counts": RequestCounts(
                total=row["total"], completed=row["completed"], failed=row["failed"]
            ),
            "metadata": json.loads(row["metadata"]) if row["metadata"] is not None else None,
            "usage": _usage(row),
            "deadline": int(row["deadline_at"]) if row["deadline_at"] is not None else None,
            "deadline_state": deadline_state,
            "progress": round(done / row["total"], 6) if row["total"] else 0.0,
            "tokens_per_second": _rate(row, outlook.now_s),
            "estimated_finish_at": int(finish_at) if finish_at is not None else None,
        }
    )


PLAIN = (
    "id",
    "endpoint",
    "model",
    "input_file_id",
    "completion_window",
    "status",
    "output_file_id",
    "error_file_id",
    "priority",
)


def _errors(row: RowMapping) -> ErrorList | None:
    return ErrorList(data=json.loads(row["errors"])) if row["errors"] is not None else None


def _usage(row: RowMapping) -> Usage:
    return Usage(
        input_tokens=row["input_tokens"],
        input_tokens_details=InputTokensDetails(cached_tokens=row["cached_tokens"]),
        output_tokens=row["output_tokens"],
        output_tokens_details=OutputTokensDetails(reasoning_tokens=row["reasoning_tokens"]),
        total_tokens=row["input_tokens"] + row["output_tokens"],
    )


def _rate(row: RowMapping, now_s: float) -> float | None:
    """Tokens a second since the batch came into progress, to its end or to this moment."""
    if row["in_progress_at"] is None:
        return None
    ends = [row[name] for name in ("finalizing_at", "cancelled_at", "expired_at") if row[name]]
    elapsed_s = min([*ends, now_s]) - row["in_progress_at"]
    tokens = row["input_tokens"] + row["output_tokens"]
    return round(tokens / elapsed_s, 3) if elapsed_s > 0 else None


def _future(row: RowMapping, outlook: Outlook) -> tuple[float | None, DeadlineState]:
    status = Status(row["status"])
    if status in TERMINAL:
        return None, "met" if status is Status.COMPLETED else "missed"
    views = {view.batch_id: view for view in outlook.ordered}
    view = views.get(row["id"])
    if view is None:  # it came or ended while we looked
        return None, "unknown"
    finish_at = deadlines.estimated_finish(
        row["id"], outlook.ordered, outlook.now_s, outlook.harvest
    )
    state = deadlines.deadline_state(view, finish_at, outlook.now_s, outlook.harvest)
    return finish_at, state
