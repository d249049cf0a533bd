"""Whether an owner may have one more batch or file: what it has is counted in the transaction
that makes it, one after the other for each owner."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from conserve.batch.database import Database
from conserve.batch.deadlines import view_of
from conserve.batch.errors import InvalidRequestError, OverLimitError
from conserve.batch.lifecycle import FileState
from conserve.batch.owner_limits import Limits
from conserve.batch.records import LiveBatch
from conserve.batch.schema import batches, files, is_live


class Queued(NamedTuple):
    """Of an owner's batches that have not ended: what is left to run, as it is estimated."""

    batches: int = 0
    requests: int = 0
    tokens: int = 0


class _Words(NamedTuple):
    """How a limit is spoken of: what it counts, its name, and what to do."""

    what: str
    state: str
    limit: str
    param: str
    split: str
    wait: str = "wait for one to end, or cancel one"


_BATCHES = _Words(
    "batches", "have not ended", "--max-live-batches", "input_file_id", "ask for a higher limit"
)
_REQUESTS = _Words(
    "requests", "are queued", "max_queued_requests", "input_file_id", "split the file"
)
_TOKENS = _Words("tokens", "are queued", "max_queued_tokens", "input_file_id", "split the file")
_BYTES = _Words("bytes", "are stored", "max_stored_bytes", "file", "split the file", "delete files")


class Quota:
    def __init__(self, database: Database, limits: Limits) -> None:
        self._database = database
        self._limits = limits

    async def check_batch(
        self, connection: AsyncConnection, tenant: str, requests: int, tokens: int
    ) -> None:
        """Raises OverLimitError; or InvalidRequestError, where waiting would not help."""
        await self._database.queue_up(connection, tenant)
        limits = self._limits.of(tenant)
        has = await _queued(connection, tenant)
        _check(limits.max_live_batches, has.batches, 1, _BATCHES)
        _check(limits.max_queued_requests, has.requests, requests, _REQUESTS)
        _check(limits.max_queued_tokens, has.tokens, tokens, _TOKENS)

    async def check_file(self, connection: AsyncConnection, tenant: str, num_bytes: int) -> None:
        """Raises OverLimitError; or InvalidRequestError, where waiting would not help."""
        limit = self._limits.of(tenant).max_stored_bytes
        if limit is None:
            return
        await self._database.queue_up(connection, tenant)
        kept = files.c.state != FileState.DELETING
        query = select(func.sum(files.c.bytes)).where(files.c.tenant == tenant, kept)
        has = int((await connection.execute(query)).scalar() or 0)
        _check(limit, has, num_bytes, _BYTES)


async def _queued(connection: AsyncConnection, tenant: str) -> Queued:
    """A batch that is not validated yet has the lines of its file."""
    columns = (batches.c[name] for name in LiveBatch.__struct_fields__)
    query = (
        select(files.c.num_lines, *columns)
        .outerjoin_from(batches, files, files.c.id == batches.c.input_file_id)
        .where(is_live(), batches.c.tenant == tenant)
    )
    requests, tokens = 0, 0.0
    rows = (await connection.execute(query)).all()
    for num_lines, *row in rows:
        batch = LiveBatch(*row)
        view = view_of(batch)
        requests += view.num_left if batch.total else num_lines or 0
        tokens += view.remaining_tokens
    return Queued(len(rows), requests, int(tokens))


def _check(limit: int | None, has: int, more: int, words: _Words) -> None:
    if limit is None or has + more <= limit:
        return
    if more > limit:
        message = f"{words.param}: {more:,} {words.what}, and this key may have {limit:,} in all"
        message = f"{message} ({words.limit}); {words.split}."
        raise InvalidRequestError(message, code="over_limit", param=words.param)
    message = f"{has:,} {words.what} of this key {words.state}, and {more:,} more would be over the"
    raise OverLimitError(f"{message} limit of {limit:,} ({words.limit}); {words.wait}.")
