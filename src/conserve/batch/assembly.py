"""The last job of a batch: write its output and error files, and end it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from uuid import uuid4

from conserve.batch.contents import Staging
from conserve.batch.file_store import BATCH_OUTPUT, FileStore, Upload
from conserve.batch.job_store import JobStore
from conserve.batch.lifecycle import Status
from conserve.batch.outcome import never_ran
from conserve.batch.records import BatchRecord, FileRecord, LineEnd

KINDS = ("output", "error")
END_OF = {
    Status.VALIDATING: Status.EXPIRED,
    Status.FINALIZING: Status.COMPLETED,
    Status.CANCELLING: Status.CANCELLED,
    Status.IN_PROGRESS: Status.EXPIRED,
}
UNRUN_CODE = {Status.CANCELLED: "batch_cancelled", Status.EXPIRED: "batch_expired"}


class Assembly:
    """May be cut off at any point and begun anew, here or elsewhere. Each run keeps files of its
    own, so that a worker that was taken for dead overwrites none, and clears away what earlier
    ones left."""

    def __init__(self, jobs: JobStore, files: FileStore) -> None:
        self._jobs = jobs
        self._files = files

    async def run(self, batch: BatchRecord) -> None:
        """End a batch whose lines are all at rest, or whose time was over before it had any.

        Raises LeaseLostError when the batch is cancelled meanwhile or taken over.
        """
        if batch.status == Status.IN_PROGRESS and not batch.expiring:
            batch = await self._jobs.finalize(batch)
        target = END_OF[batch.status]
        made: dict[str, FileRecord] = {}
        # A batch that was never in progress has no lines, only leavings.
        if batch.in_progress_at is not None:
            names = [_filename(batch, kind) for kind in KINDS]
            for file_id in await self._jobs.drop_leavings(batch, names):
                await self._files.contents.delete(file_id)
            made = await self._write(batch, UNRUN_CODE.get(target))
        await self._jobs.settle(batch, target, made)

    async def _write(self, batch: BatchRecord, unrun_code: str | None) -> dict[str, FileRecord]:
        """Both files, kept. Returns the file of each kind that has lines. They are written in
        threads: a disk that is slow would hold up the loop, which answers chats."""
        folder = self._files.contents.staging_dir
        names = {kind: folder / f"{batch.id}-{kind}-{uuid4().hex}" for kind in KINDS}
        counts = dict.fromkeys(KINDS, 0)
        with Staging(names["output"]) as output, Staging(names["error"]) as error:
            staged = {"output": output, "error": error}
            async for ends in self._jobs.outcomes(batch.id):
                written = await asyncio.to_thread(_write, staged, batch.id, ends, unrun_code)
                counts = {kind: counts[kind] + written[kind] for kind in KINDS}
            made = {}
            for kind in KINDS:
                await asyncio.to_thread(staged[kind].finish)
                if counts[kind]:
                    upload = _upload(batch, kind, staged[kind].path, counts[kind])
                    made[kind] = await self._files.keep(upload, staged[kind].path)
        return made


def _filename(batch: BatchRecord, kind: str) -> str:
    return f"{batch.id}_{kind}.jsonl"


def _upload(batch: BatchRecord, kind: str, staged: Path, num_lines: int) -> Upload:
    return Upload(
        tenant=batch.tenant,
        filename=_filename(batch, kind),
        purpose=BATCH_OUTPUT,
        bytes=staged.stat().st_size,
        num_lines=num_lines,
        expires_after_s=batch.output_expires_after_s,
    )


def _write(
    staged: Mapping[str, Staging], batch_id: str, ends: Iterable[LineEnd], unrun_code: str | None
) -> Mapping[str, int]:
    """How many lines have been added to each kind of file."""
    counts = Counter[str]()
    for line in ends:
        kind = "error" if line.failed in (True, None) else "output"
        staged[kind].write(_payload(batch_id, line, unrun_code))
        staged[kind].write(b"\n")
        counts[kind] += 1
    return counts


def _payload(batch_id: str, line: LineEnd, unrun_code: str | None) -> bytes:
    if line.payload is not None:
        return line.payload
    assert unrun_code is not None, "a completed batch has a result for every line"
    return never_ran(batch_id, line.line_no, line.custom_id, unrun_code)
