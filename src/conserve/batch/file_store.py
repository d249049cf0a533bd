"""Rows and contents of files, kept in step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from msgspec.structs import replace
from sqlalchemy import and_, delete, exists, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from conserve.batch.contents import FileContents
from conserve.batch.database import Database
from conserve.batch.due import is_due
from conserve.batch.errors import InvalidRequestError, NotFoundError, StoreUnavailableError
from conserve.batch.ids import FILE_ID, new_file_id
from conserve.batch.lifecycle import FileState
from conserve.batch.quota import Quota
from conserve.batch.records import FileRecord
from conserve.batch.schema import batches, files, is_live, is_passing

logger = logging.getLogger(__name__)

# An upload whose row is this old and still not ready belongs to a process that died.
STALE_UPLOAD_S = 3600.0
COLLECT_ROWS = 100
# Files that a collection passes over before it is given up, as where the storage is away.
MAX_STUCK = 10_000
BATCH, BATCH_OUTPUT = "batch", "batch_output"
ROWS_AT_ONCE = 500
"""Of a page that may have ten thousand: the loop answers chats in between."""
PLACE_KEPT_S = 600.0
"""A row outlives its file by so long where its owner has deleted it: `expires_at` is then when."""
DOOMED: dict[str, Any] = {"state": FileState.DELETING, "expires_at": None}
"""Of a file that goes with the next collection."""


@dataclass(frozen=True)
class Upload:
    """A file at hand in staging, checked as far as a file alone can be."""

    tenant: str
    filename: str
    purpose: str
    bytes: int
    num_lines: int
    expires_after_s: int | None = None


class FileStore:
    """A row comes before its blob and leaves after it, so no blob is ever without a row."""

    def __init__(
        self,
        database: Database,
        contents: FileContents,
        clock: Callable[[], float],
        quota: Quota,
    ) -> None:
        self._database = database
        self.contents = contents
        self._clock = clock
        self._quota = quota

    async def add(self, upload: Upload, staged: Path) -> FileRecord:
        """Keep the staged file under a new id. Raises OverLimitError, or InvalidRequestError for a
        file that its owner may never have."""
        file = await self._keep(upload, staged, is_limited=True)
        async with self._database.write() as connection:
            shown = await connection.execute(
                update(files)
                .where(files.c.id == file.id, files.c.state == FileState.UPLOADING)
                .values(state=FileState.READY)
            )
        if shown.rowcount != 1:
            raise StoreUnavailableError("The upload took too long to be stored; send it again.")
        return replace(file, state=FileState.READY)

    async def keep(self, upload: Upload, staged: Path) -> FileRecord:
        """The staged file under a new id, seen by nobody until its state says that it is ready.
        However much its owner has: results are always kept."""
        return await self._keep(upload, staged, is_limited=False)

    async def _keep(self, upload: Upload, staged: Path, *, is_limited: bool) -> FileRecord:
        file = new_file(new_file_id(), upload, self._clock())
        async with self._database.write() as connection:
            if is_limited:
                await self._quota.check_file(connection, upload.tenant, upload.bytes)
            await connection.execute(insert(files).values(file.to_row()))
        try:
            await self.contents.keep(staged, file.id)
        except Exception:
            with suppress(StoreUnavailableError):
                await self._count_nothing(file.id)
            raise
        return file

    async def _count_nothing(self, file_id: str) -> None:
        """Of a file that could not be stored: its row waits for the collection, since the storage
        may come to have it all the same, and its owner may send it again meanwhile."""
        async with self._database.write() as connection:
            await connection.execute(update(files).where(files.c.id == file_id).values(bytes=0))

    async def get(self, tenant: str, file_id: str) -> FileRecord:
        """Raises NotFoundError: no such file, expired, or another tenant's."""
        async with self._database.read() as connection:
            return await self._file(connection, tenant, file_id)

    async def _file(self, connection: AsyncConnection, tenant: str, file_id: str) -> FileRecord:
        query = select(files).where(files.c.id == file_id, *self._visible(tenant))
        row = None
        if FILE_ID.fullmatch(file_id):
            row = (await connection.execute(query)).first()
        if row is None:
            raise NotFoundError(f"No such File object: {file_id[:100]!r}", param="file_id")
        return FileRecord.from_row(row)

    def _visible(self, tenant: str) -> list[Any]:
        fresh = or_(files.c.expires_at.is_(None), files.c.expires_at > self._clock())
        return [files.c.tenant == tenant, files.c.state == FileState.READY, fresh]

    async def page(
        self,
        tenant: str,
        after: str | None,
        limit: int,
        order: Literal["asc", "desc"],
        purpose: str | None,
    ) -> tuple[list[FileRecord], bool]:
        """Files after the one named, and whether more follow."""
        descending = order == "desc"
        columns = (files.c.created_at, files.c.id)
        query = select(files).where(*self._visible(tenant))
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        query = query.order_by(*(c.desc() if descending else c.asc() for c in columns))
        found: list[FileRecord] = []
        async with self._database.read() as connection:
            place = await self._place(connection, tenant, after) if after is not None else None
            while (left := limit + 1 - len(found)) > 0:
                part = query if place is None else query.where(later(columns, place, descending))
                rows = (await connection.execute(part.limit(min(left, ROWS_AT_ONCE)))).all()
                found += [FileRecord.from_row(row) for row in rows]
                if len(rows) < ROWS_AT_ONCE:
                    break
                place = found[-1].created_at, found[-1].id
        return found[:limit], len(found) > limit

    @staticmethod
    async def _place(connection: AsyncConnection, tenant: str, file_id: str) -> tuple[float, str]:
        """Where a file stands in the list, or stood until a moment ago: whoever deletes what a page
        has goes on from there. Raises NotFoundError."""
        query = select(files.c.created_at, files.c.id).where(
            files.c.id == file_id, files.c.tenant == tenant
        )
        row = None
        if FILE_ID.fullmatch(file_id):
            row = (await connection.execute(query)).first()
        if row is None:
            raise NotFoundError(f"No such File object: {file_id[:100]!r}", param="file_id")
        return row[0], row[1]

    async def delete(self, tenant: str, file_id: str) -> None:
        """Its row stays for a while, seen by nobody.

        Raises NotFoundError, or InvalidRequestError while a live batch reads the file.
        """
        async with self._database.write() as connection:
            await self._file(connection, tenant, file_id)
            here = files.c.id == file_id
            await connection.execute(select(files.c.id).where(here).with_for_update())
            if (await connection.execute(select(_in_use(file_id)))).scalar_one():
                message = f"File {file_id!r} is the input of a batch that has not ended; cancel it."
                raise InvalidRequestError(message, code="file_in_use", param="file_id")
            gone = {"state": FileState.DELETING, "expires_at": self._clock()}
            await connection.execute(update(files).where(here).values(**gone))
        await self.contents.delete(file_id)

    async def delete_all(self, tenant: str) -> None:
        """Every file of the tenant, whatever reads it."""
        here = files.c.tenant == tenant
        async with self._database.write() as connection:
            await connection.execute(update(files).where(here).values(**DOOMED))
            ids = (await connection.execute(select(files.c.id).where(here))).scalars().all()
        for file_id in ids:
            await self.contents.delete(file_id)
            await self._forget(file_id)

    async def _forget(self, file_id: str) -> None:
        async with self._database.write() as connection:
            await connection.execute(
                delete(files).where(files.c.id == file_id, files.c.state == FileState.DELETING)
            )

    async def collect(self) -> int:
        """Delete what expired, and what an earlier process left half made or half deleted.

        Returns how many files went. One that cannot be deleted stays for the next time, and keeps
        no other.
        """
        num_gone, stuck = 0, set[str]()
        while len(stuck) < MAX_STUCK and (ids := await self._doom(stuck)):
            for file_id in ids:
                try:
                    await self.contents.delete(file_id)
                except StoreUnavailableError as error:
                    if not stuck:  # where the storage is away, there would be a line for each
                        logger.warning("%s cannot be deleted: %s", file_id, error.__cause__)
                    stuck.add(file_id)
                    continue
                await self._forget(file_id)
                num_gone += 1
        if len(stuck) > 1:
            logger.warning("and so it is with others: %d files stay for now", len(stuck) - 1)
        return num_gone

    async def _doom(self, stuck: Collection[str]) -> Sequence[str]:
        """Some files that are to go, none of them `stuck`; from here on nobody sees them."""
        now = self._clock()
        stale = and_(
            files.c.state == FileState.UPLOADING, files.c.created_at < now - STALE_UPLOAD_S
        )
        late = and_(
            files.c.state == FileState.READY, files.c.expires_at <= now, ~_in_use(files.c.id)
        )
        at = files.c.expires_at
        over = and_(
            files.c.state == FileState.DELETING, or_(at.is_(None), is_due(at, now - PLACE_KEPT_S))
        )
        doomed = or_(over, stale, late)
        query = select(files.c.id).where(is_passing(), doomed, files.c.id.not_in(stuck))
        async with self._database.write() as connection:
            some = query.limit(COLLECT_ROWS).with_for_update(skip_locked=True)
            ids = (await connection.execute(some)).scalars().all()
            await connection.execute(update(files).where(files.c.id.in_(ids)).values(**DOOMED))
        return ids


def _in_use(file_id: Any) -> Any:
    return exists().where(batches.c.input_file_id == file_id, is_live())


def later(columns: tuple[Any, Any], last: tuple[float, str], descending: bool) -> Any:
    """Rows that stand after `last` in the order of both columns."""
    (when, ident), (last_when, last_id) = columns, last
    if descending:
        return or_(when < last_when, and_(when == last_when, ident < last_id))
    return or_(when > last_when, and_(when == last_when, ident > last_id))


def new_file(file_id: str, upload: Upload, now: float) -> FileRecord:
    expires_after_s = upload.expires_after_s
    return FileRecord(
        id=file_id,
        tenant=upload.tenant,
        filename=upload.filename,
        purpose=upload.purpose,
        bytes=upload.bytes,
        num_lines=upload.num_lines,
        created_at=now,
        expires_at=now + expires_after_s if expires_after_s is not None else None,
        state=FileState.UPLOADING,
    )
