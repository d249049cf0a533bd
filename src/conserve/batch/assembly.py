"""The last job of a batch: write its output and error files, and end it."""

from __future__ import annotations

from collections.abc import Callable
from uuid import uuid4

from conserve.batch.contents import FileContents, Staging
from conserve.batch.file_store import BATCH_OUTPUT, Upload, new_file
from conserve.batch.ids import result_file_id
from conserve.batch.job_store import JobStore
from conserve.batch.lifecycle import FileState, Status
from conserve.batch.outcome import never_ran
from conserve.batch.records import BatchRecord, FileRecord, LineEnd

KINDS = ("output", "error")
END_OF = {
    Status.FINALIZING: Status.COMPLETED,
    Status.CANCELLING: Status.CANCELLED,
    Status.IN_PROGRESS: Status.EXPIRED,
}
UNRUN_CODE = {Status.CANCELLED: "batch_cancelled", Status.EXPIRED: "batch_expired"}


class Assembly:
    """May be cut off at any point and begun anew, here or elsewhere: same ids, same contents."""

    def __init__(self, jobs: JobStore, contents: FileContents, clock: Callable[[], float]) -> None:
        self._jobs = jobs
        self._contents = contents
        self._clock = clock

    async def run(self, batch: BatchRecord) -> None:
        """End a batch whose lines are all at rest.

        Raises LeaseLostError when the batch is cancelled meanwhile or taken over.
        """
        if batch.status == Status.IN_PROGRESS and not batch.expiring:
            batch = await self._jobs.finalize(batch)
        target = END_OF[batch.status]
        made: dict[str, FileRecord] = {}
        # A batch cancelled before it was ever in progress has no lines, only leavings.
        if batch.in_progress_at is not None:
            made = await self._write(batch, UNRUN_CODE.get(target))
        await self._jobs.settle(batch, target, made)

    async def _write(self, batch: BatchRecord, unrun_code: str | None) -> dict[str, FileRecord]:
        """Both files, kept. Returns the file of each kind that has lines."""
        folder = self._contents.staging_dir
        names = {kind: folder / f"{result_file_id(batch.id, kind)}-{uuid4().hex}" for kind in KINDS}
        counts = dict.fromkeys(KINDS, 0)
        with Staging(names["output"]) as output, Staging(names["error"]) as error:
            staged = {"output": output, "error": error}
            async for line in self._jobs.outcomes(batch.id):
                kind = "error" if line.failed in (True, None) else "output"
                staged[kind].write(_payload(batch.id, line, unrun_code) + b"\n")
                counts[kind] += 1
            made = {}
            for kind in KINDS:
                staged[kind].finish()
                if counts[kind]:
                    made[kind] = self._file(batch, kind, staged[kind], counts[kind])
                    await self._contents.keep(staged[kind].path, made[kind].id)
        return made

    def _file(self, batch: BatchRecord, kind: str, staged: Staging, num_lines: int) -> FileRecord:
        upload = Upload(
            tenant=batch.tenant,
            filename=f"{batch.id}_{kind}.jsonl",
            purpose=BATCH_OUTPUT,
            bytes=staged.path.stat().st_size,
            num_lines=num_lines,
            expires_after_s=batch.output_expires_after_s,
        )
        return new_file(result_file_id(batch.id, kind), upload, self._clock(), FileState.READY)


def _payload(batch_id: str, line: LineEnd, unrun_code: str | None) -> bytes:
    if line.payload is not None:
        return line.payload
    assert unrun_code is not None, "a completed batch has a result for every line"
    return never_ran(batch_id, line.line_no, line.custom_id, unrun_code)
