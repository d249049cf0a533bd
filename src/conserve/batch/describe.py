"""From a record to what its owner sees."""

from __future__ import annotations

from datetime import date, timedelta

from conserve.batch.lifecycle import PAUSABLE, TERMINAL, Status
from conserve.batch.outlook import Outlook
from conserve.batch.records import BatchRecord, FileRecord
from conserve.batch.usage_store import Counts, DayUsage
from conserve.batch.wire import (
    BatchObject,
    DeadlineState,
    ErrorList,
    FileObject,
    InputTokensDetails,
    OutputTokensDetails,
    RequestCounts,
    Usage,
    UsageDay,
)

EPOCH = date(1970, 1, 1)


def file_object(file: FileRecord) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=int(file.created_at),
        expires_at=_second(file.expires_at),
        filename=file.filename,
        purpose=file.purpose,
    )


def batch_object(batch: BatchRecord, outlook: Outlook) -> BatchObject:
    finish_at, deadline_state = _future(batch, outlook)
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        model=batch.model,
        errors=ErrorList(data=list(batch.errors)) if batch.errors is not None else None,
        input_file_id=batch.input_file_id,
        completion_window=batch.completion_window,
        status=batch.status.value,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=int(batch.created_at),
        in_progress_at=_second(batch.in_progress_at),
        expires_at=_second(batch.expires_at),
        finalizing_at=_second(batch.finalizing_at),
        completed_at=_second(batch.completed_at),
        failed_at=_second(batch.failed_at),
        expired_at=_second(batch.expired_at),
        cancelling_at=_second(batch.cancelling_at),
        cancelled_at=_second(batch.cancelled_at),
        request_counts=_counts(batch),
        metadata=batch.metadata,
        usage=_usage(batch),
        priority=batch.priority,
        paused_at=_second(batch.paused_at) if batch.status in PAUSABLE else None,
        deadline=_second(batch.deadline_at),
        deadline_state=deadline_state,
        progress=round(batch.num_done / batch.total, 6) if batch.total else 0.0,
        tokens_per_second=_rate(batch, outlook.now_s),
        estimated_finish_at=_second(finish_at),
    )


def usage_day(day: DayUsage) -> UsageDay:
    return UsageDay(
        date=(EPOCH + timedelta(days=day.day)).isoformat(),
        request_class=day.billed.request_class,
        model=day.billed.model or None,
        completed=day.counts.completed,
        failed=day.counts.failed,
        usage=_usage(day.counts),
    )


def _second(moment: float | None) -> int | None:
    """OpenAI's times are whole seconds."""
    return None if moment is None else int(moment)


def _counts(batch: BatchRecord) -> RequestCounts:
    return RequestCounts(total=batch.total, completed=batch.completed, failed=batch.failed)


def _usage(batch: BatchRecord | Counts) -> Usage:
    return Usage(
        input_tokens=batch.input_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=batch.cached_tokens),
        output_tokens=batch.output_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=batch.reasoning_tokens),
        total_tokens=batch.input_tokens + batch.output_tokens,
    )


def _rate(batch: BatchRecord, now_s: float) -> float | None:
    """Tokens a second since the batch came into progress, to its end or to this moment."""
    if batch.in_progress_at is None:
        return None
    ends = filter(
        None, (batch.finalizing_at, batch.cancelled_at, batch.expired_at, batch.failed_at)
    )
    elapsed_s = min([*ends, now_s]) - batch.in_progress_at
    return round(batch.total_tokens / elapsed_s, 3) if elapsed_s > 0 else None


def _future(batch: BatchRecord, outlook: Outlook) -> tuple[float | None, DeadlineState]:
    if batch.status in TERMINAL:
        return None, "met" if batch.status is Status.COMPLETED else "missed"
    prospect = outlook.prospects.get(batch.id)
    if prospect is None:  # it came or ended while we looked
        return None, "unknown"
    return prospect.finish_at, prospect.state
