"""Tables of the store. Times are seconds since the epoch, as the injected clock tells them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    or_,
    text,
    true,
)

from conserve.batch.lifecycle import LIVE

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_N_label)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


LIVE_STATUSES = f"status IN {tuple(map(str, sorted(LIVE)))}"


PASSING_FILES = "(state != 'ready' OR expires_at IS NOT NULL)"


def _where(condition: str) -> dict[str, Any]:
    """Options of an index that holds the rows of which `condition` is true, and no others."""
    return {f"{database}_where": text(condition) for database in ("sqlite", "postgresql")}


files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("filename", String(255), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("num_lines", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("state", String(16), nullable=False),
    Index("ix_files_listing", "tenant", "created_at", "id"),
    Index("ix_files_passing", "id", **_where(PASSING_FILES)),
)

batches = Table(
    "batches",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("input_file_id", String(64), nullable=False),
    Column("completion_window", String(32), nullable=False),
    Column("metadata", Text),
    Column("output_expires_after_s", Integer),
    Column("priority", Integer, nullable=False),
    Column("deadline_at", Double),
    Column("idempotency_key", String(255)),
    Column("idempotency_digest", String(64)),
    Column("status", String(16), nullable=False),
    # Set when an in_progress batch passed expires_at: no line is leased any more.
    Column("expiring", Boolean, nullable=False),
    # The worker that validates or assembles this batch, if any.
    Column("owner", String(64)),
    Column("not_before", Double, nullable=False),
    # Of its jobs: how often one failed, and how often one was lost with its process.
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("losses", Integer, nullable=False, server_default="0"),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("in_progress_at", Double),
    Column("finalizing_at", Double),
    Column("completed_at", Double),
    Column("failed_at", Double),
    Column("expired_at", Double),
    Column("cancelling_at", Double),
    Column("cancelled_at", Double),
    # While it is set, no line is leased.
    Column("paused_at", Double),
    Column("model", Text),
    Column("errors", Text),
    Column("output_file_id", String(64)),
    Column("error_file_id", String(64)),
    Column("total", Integer, nullable=False),
    Column("completed", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),
    # Tokens the whole batch is expected to take, known before its first result.
    Column("estimated_tokens", BigInteger, nullable=False),
    # True until the lines and results of a finished batch are deleted.
    Column("has_lines", Boolean, nullable=False),
    UniqueConstraint("tenant", "idempotency_key"),
    Index("ix_batches_listing", "tenant", "created_at", "id"),
    Index("ix_batches_status", "status"),
    Index("ix_batches_input", "input_file_id"),
    # Every worker looks for these all the time; ended batches stay for ever.
    Index("ix_batches_live", "status", "created_at", **_where(LIVE_STATUSES)),
    Index("ix_batches_uncleared", "id", **_where("has_lines")),
)

ended = Table(
    "ended",
    metadata,
    # What the batches that ended in this status came to in all, deleted ones included.
    Column("status", String(16), primary_key=True),
    # Those that are still in `batches`.
    Column("num_batches", Integer, nullable=False),
    Column("total", BigInteger, nullable=False),
    Column("completed", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
)

lines = Table(
    "lines",
    metadata,
    Column("batch_id", String(64), ForeignKey(batches.c.id), primary_key=True),
    Column("line_no", Integer, primary_key=True, autoincrement=False),
    Column("custom_id", Text, nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("length", Integer, nullable=False),
    Column("prefix_key", String(64), nullable=False),
    Column("state", String(8), nullable=False),
    Column("owner", String(64)),
    Column("not_before", Double, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("losses", Integer, nullable=False),
    Index("ix_lines_order", "batch_id", "state", "prefix_key", "line_no"),
    Index("ix_lines_leased", "owner", "batch_id", **_where("owner IS NOT NULL")),
    Index("ix_lines_lost", "batch_id", "line_no", **_where("losses > 0")),
)

results = Table(
    "results",
    metadata,
    Column("batch_id", String(64), ForeignKey(batches.c.id), primary_key=True),
    Column("line_no", Integer, primary_key=True, autoincrement=False),
    Column("failed", Boolean, nullable=False),
    # The finished line of the output or error file, without its newline.
    Column("payload", LargeBinary, nullable=False),
)

workers = Table(
    "workers",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("expires_at", Double, nullable=False),
)

harvest = Table(
    "harvest",
    metadata,
    Column("worker_id", String(64), primary_key=True),
    Column("minute", BigInteger, primary_key=True, autoincrement=False),
    Column("requests", Integer, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    # Seconds of this minute in which the worker had at least one line in flight.
    Column("busy_s", Double, nullable=False),
)


shares = Table(
    "shares",
    metadata,
    Column("tenant", String(64), primary_key=True),
    # Tokens that its lines took, over its share of the harvest.
    Column("served", Double, nullable=False),
)


_COUNTS = (
    "completed",
    "failed",
    "input_tokens",
    "cached_tokens",
    "output_tokens",
    "reasoning_tokens",
)


def _counts() -> list[Column[int]]:
    return [Column(name, BigInteger, nullable=False) for name in _COUNTS]


day_usage = Table(
    "day_usage",
    metadata,
    # Since the epoch, of UTC.
    Column("day", Integer, primary_key=True, autoincrement=False),
    Column("tenant", String(64), primary_key=True),
    Column("request_class", String(8), primary_key=True),
    # Empty where it is not known.
    Column("model", String(255), primary_key=True),
    # The process that counts here; empty: what several have counted, added up.
    Column("writer", String(64), primary_key=True),
    *_counts(),
    # Every worker looks for what is to be added up; what has been stays for a year.
    Index("ix_day_usage_writers", "day", **_where("writer <> ''")),
)

# Servers from before `day_usage` count here, as long as some run beside newer ones.
usage = Table(
    "usage",
    metadata,
    Column("tenant", String(64), primary_key=True),
    Column("day", Integer, primary_key=True, autoincrement=False),
    *_counts(),
)


webhooks = Table(
    "webhooks",
    metadata,
    # A batch that has ended, of which its owner has not been told yet.
    Column("batch_id", String(64), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("status", String(16), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("not_before", Double, nullable=False),
    Index("ix_webhooks_due", "not_before"),
)


def is_live() -> Any:
    """Batches that have not ended, in the words of the index that holds no others."""
    return text(f"batches.{LIVE_STATUSES}")


def is_passing() -> Any:
    """Files that may be deleted one day without being told to, in the words of their index."""
    return text("(files.state != 'ready' OR files.expires_at IS NOT NULL)")


def of_models(models: Collection[str] | None) -> Any:
    """Batches of one of the models, and those that name none yet; all where `models` is None."""
    if models is None:
        return true()
    return or_(batches.c.model.is_(None), batches.c.model.in_(sorted(models)))
