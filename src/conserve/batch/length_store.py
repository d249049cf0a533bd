"""How long answers are, learned from what an owner's earlier batches came to."""

from __future__ import annotations

from sqlalchemy import select

from conserve.batch.database import Database
from conserve.batch.request_line import WITHOUT_OUTPUT
from conserve.batch.schema import batches

RECENT_BATCHES = 50
LEAST_LINES = 20
"""Fewer answers than these say little about a mean."""


class LengthStore:
    """Raises StoreUnavailableError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def expected(self, tenant: str, endpoint: str, model: str | None) -> float | None:
        """Mean output tokens of a line of the owner's newest batches of this endpoint and model;
        None while there are too few to tell."""
        if endpoint in WITHOUT_OUTPUT:
            return 0.0
        names = ("endpoint", "model", "completed", "output_tokens")
        query = (
            select(*(batches.c[name] for name in names))
            .where(batches.c.tenant == tenant)
            .order_by(batches.c.created_at.desc(), batches.c.id.desc())
            .limit(RECENT_BATCHES)
        )
        async with self._database.read() as connection:
            rows = (await connection.execute(query)).all()
        alike = [(done, tokens) for *kind, done, tokens in rows if kind == [endpoint, model]]
        num_lines = int(sum(done for done, _ in alike))
        num_tokens = int(sum(tokens for _, tokens in alike))
        return num_tokens / num_lines if num_lines >= LEAST_LINES else None
