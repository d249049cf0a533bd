"""What each owner's requests came to, by day, class and model. What was counted before, and
servers from before count still, is taken over by `UsageStore.tidy`."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

SUMS = (
    "completed",
    "failed",
    "input_tokens",
    "cached_tokens",
    "output_tokens",
    "reasoning_tokens",
)


def upgrade() -> None:
    op.create_table(
        "day_usage",
        sa.Column("day", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("request_class", sa.String(length=8), nullable=False),
        sa.Column("model", sa.String(length=255), nullable=False),
        sa.Column("writer", sa.String(length=64), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in SUMS),
        sa.PrimaryKeyConstraint(
            "day", "tenant", "request_class", "model", "writer", name=op.f("pk_day_usage")
        ),
    )
    apart = sa.text("writer <> ''")
    op.create_index(
        "ix_day_usage_writers", "day_usage", ["day"], sqlite_where=apart, postgresql_where=apart
    )


def downgrade() -> None:
    op.drop_table("day_usage")
