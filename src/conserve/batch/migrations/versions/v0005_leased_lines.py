"""An index of the lines that are somebody's, which are few, in place of one of all lines."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    held = sa.text("owner IS NOT NULL")
    op.create_index(
        "ix_lines_leased",
        "lines",
        ["owner", "batch_id"],
        sqlite_where=held,
        postgresql_where=held,
        if_not_exists=True,  # an operator may have built it while servers ran: see docs/fleet.md
    )
    op.drop_index("ix_lines_owner", "lines")


def downgrade() -> None:
    op.create_index("ix_lines_owner", "lines", ["owner"])
    op.drop_index("ix_lines_leased", "lines")
