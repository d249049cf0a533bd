"""Where file contents live: a local folder, or whatever fsspec reaches."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import fsspec

from conserve.batch.errors import StorageFullError, StoreUnavailableError
from conserve.batch.private import make_folder, open_private

logger = logging.getLogger(__name__)

CHUNK_BYTES = 65_536
AWAY = "The storage for files does not answer; try again."
# Ends the name of a file on its way from another disk.
MOVING = ".moving"
# A staging file nobody wrote to for so long belongs to nobody.
STALE_S = 3600.0


class FileContents:
    """Blobs by id. A blob is there entirely or not at all; writing one twice is harmless.

    Raises StoreUnavailableError (StorageFullError on a full disk) where the storage fails, and
    FileNotFoundError where a blob is missing.
    """

    def __init__(self, url: str, staging_dir: Path) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(url)
        self._is_local = urlsplit(url).scheme in ("", "file", "local")
        self.staging_dir = staging_dir

    async def prepare(self) -> None:
        """Make the folders, and clear what was left in them."""
        await asyncio.to_thread(self._prepare)

    def _prepare(self) -> None:
        with self._errors():
            make_folder(self.staging_dir)
            if Path(self._root).parent == self.staging_dir.parent:
                make_folder(Path(self._root))
            else:  # a place of the operator's, who says who may look into it
                self._fs.makedirs(self._root, exist_ok=True)
            self._clear()

    async def clear_leavings(self) -> None:
        """Clear away what processes left that died while they wrote."""
        await asyncio.to_thread(self._clear)

    def _clear(self) -> None:
        with missing_is_away(), storage_errors():
            left = list(self.staging_dir.iterdir())
            if self._is_local:
                left += Path(self._root).glob(f"*{MOVING}")
        stale = time.time() - STALE_S
        for path in left:
            try:
                if path.stat().st_mtime < stale:
                    path.unlink()
            except FileNotFoundError:  # another server clears, too
                continue
            except OSError as error:
                logger.warning("%s cannot be cleared away: %s", path, error)

    async def keep(self, staged: Path, blob_id: str) -> None:
        """Move a finished staging file to its place, durably."""
        await asyncio.to_thread(self._keep, staged, blob_id)

    def _keep(self, staged: Path, blob_id: str) -> None:
        with missing_is_away(), self._errors():
            if not self._is_local:
                self._fs.put_file(str(staged), self._path(blob_id))
                staged.unlink()
                return
            _sync(staged)
            target = Path(self._path(blob_id))
            try:
                staged.replace(target)
            except OSError as error:
                # Two mounts are apart even where both are of one disk, as a container's volumes.
                if error.errno != errno.EXDEV:
                    raise
                beside = target.with_name(f"{staged.name}{MOVING}")
                _copy(staged, beside)
                _sync(beside)
                beside.replace(target)
                staged.unlink()
            _sync(target.parent)

    async def delete(self, blob_id: str) -> None:
        """Remove a blob; no error when it is gone already."""
        await asyncio.to_thread(self._delete, blob_id)

    def _delete(self, blob_id: str) -> None:
        with suppress(FileNotFoundError), self._errors():
            self._fs.rm_file(self._path(blob_id))

    async def chunks(self, blob_id: str, span: range | None = None) -> AsyncGenerator[bytes]:
        """The blob, or the bytes of it whose places are in `span`, in pieces of CHUNK_BYTES."""
        handle = await asyncio.to_thread(self._open, blob_id, span.start if span else 0)
        left = len(span) if span is not None else None
        try:
            while chunk := await asyncio.to_thread(self._read, handle, left):
                left = None if left is None else left - len(chunk)
                yield chunk
        finally:
            handle.close()

    async def ranges(self, blob_id: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Bytes of each (offset, length)."""
        return await asyncio.to_thread(self._ranges, blob_id, spans)

    def _ranges(self, blob_id: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        with self._errors():
            if not self._is_local:
                path = self._path(blob_id)
                starts = [offset for offset, _ in spans]
                ends = [offset + length for offset, length in spans]
                paths = [path] * len(spans)
                return list(self._fs.cat_ranges(paths, starts, ends, on_error="raise"))
            with open(self._path(blob_id), "rb") as handle:
                return [os.pread(handle.fileno(), length, offset) for offset, length in spans]

    def _open(self, blob_id: str, offset: int) -> IO[bytes]:
        with self._errors():
            handle: IO[bytes] = self._fs.open(self._path(blob_id), "rb")
            handle.seek(offset)
            return handle

    def _read(self, handle: IO[bytes], most: int | None) -> bytes:
        with self._errors():
            return handle.read(CHUNK_BYTES if most is None else min(most, CHUNK_BYTES))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """`storage_errors`, and what a remote storage's driver raises of its own."""
        with storage_errors():
            try:
                yield
            except FileNotFoundError as error:
                if self._is_local and not Path(self._root).is_dir():
                    raise StoreUnavailableError(AWAY) from error
                raise
            except OSError:
                raise
            except Exception as error:
                if self._is_local:
                    raise
                raise StoreUnavailableError(AWAY) from error

    def _path(self, blob_id: str) -> str:
        return f"{self._root}/{blob_id}"


class Staging:
    """A local file in the making. Removed on exit unless `FileContents.keep` took it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: IO[bytes] | None = None

    def __enter__(self) -> Staging:
        with missing_is_away(), storage_errors():
            # Line by line would be a system call each; 64 KiB at a time is one for many.
            self._handle = open(self.path, "wb", CHUNK_BYTES, opener=open_private)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._handle is not None:
            # A full disk is reported by `write` or `finish`.
            with suppress(OSError):
                self._handle.close()
        self.path.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        assert self._handle is not None
        with storage_errors():
            self._handle.write(data)

    def finish(self) -> None:
        """Everything written is in the file; no write may follow."""
        assert self._handle is not None
        with storage_errors():
            self._handle.close()


@contextmanager
def storage_errors() -> Iterator[None]:
    """OSError in, our named errors out; a missing file stays what it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageFullError("The storage for files is full; try again later.") from error
        raise StoreUnavailableError(AWAY) from error


@contextmanager
def missing_is_away() -> Iterator[None]:
    """Around writing, where what is missing is a folder: its disk is not mounted, maybe."""
    try:
        yield
    except FileNotFoundError as error:
        raise StoreUnavailableError(AWAY) from error


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as there, open(target, "wb", opener=open_private) as here:
        shutil.copyfileobj(there, here, CHUNK_BYTES)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
