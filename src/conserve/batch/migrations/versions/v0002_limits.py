"""Limits on jobs, sums of ended batches, and indexes that keep idle looks from scanning."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

SUMS = ("total", "completed", "failed", "input_tokens", "output_tokens")
LIVE = "status IN ('cancelling', 'finalizing', 'in_progress', 'validating')"
PASSING = "(state != 'ready' OR expires_at IS NOT NULL)"
ENDS = ("failed", "completed", "expired", "cancelled")


def _where(condition: str) -> dict[str, Any]:
    return {f"{database}_where": sa.text(condition) for database in ("sqlite", "postgresql")}


def upgrade() -> None:
    for name in ("attempts", "losses"):
        column = sa.Column(name, sa.Integer(), nullable=False, server_default="0")
        op.add_column("batches", column)
    op.create_index("ix_batches_live", "batches", ["status", "created_at"], **_where(LIVE))
    op.create_index("ix_batches_uncleared", "batches", ["id"], **_where("has_lines"))
    op.create_index("ix_lines_lost", "lines", ["batch_id", "line_no"], **_where("losses > 0"))
    op.create_index("ix_files_passing", "files", ["id"], **_where(PASSING))
    op.create_table(
        "ended",
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("num_batches", sa.Integer(), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in SUMS),
        sa.PrimaryKeyConstraint("status", name=op.f("pk_ended")),
    )
    _sum_up()
    # Two workers that cleared one batch at once may have left results without their lines.
    op.execute(
        "DELETE FROM results WHERE batch_id IN (SELECT id FROM batches WHERE NOT has_lines "
        "AND status IN ('failed', 'completed', 'expired', 'cancelled'))"
    )


def _sum_up() -> None:
    sums = ", ".join(f"COALESCE(SUM({name}), 0)" for name in SUMS)
    for status in ENDS:
        op.execute(
            f"INSERT INTO ended (status, num_batches, {', '.join(SUMS)}) "  # noqa: S608
            f"SELECT '{status}', COUNT(*), {sums} FROM batches WHERE status = '{status}'"
        )


def downgrade() -> None:
    op.drop_table("ended")
    op.drop_index("ix_files_passing", "files")
    op.drop_index("ix_lines_lost", "lines")
    op.drop_index("ix_batches_uncleared", "batches")
    op.drop_index("ix_batches_live", "batches")
    with op.batch_alter_table("batches", schema=None) as batch_op:
        batch_op.drop_column("losses")
        batch_op.drop_column("attempts")
