"""The last job of a batch: write its output and error files, and end it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import uuid4

from sqlalchemy import RowMapping

from conserve.batch.contents import FileContents, Staging
from conserve.batch.file_store import BATCH_OUTPUT, READY, Upload, file_row
from conserve.batch.ids import result_file_id
from conserve.batch.job_store import JobStore
from conserve.batch.lifecycle import Status
from conserve.batch.outcome import never_ran

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

    async def run(self, row: RowMapping) -> None:
        """End a batch whose lines are all at rest.

        Raises LeaseLostError when the batch is cancelled meanwhile or taken over.
        """
        if row["status"] == Status.IN_PROGRESS and not row["expiring"]:
            row = await self._jobs.finalize(row)
        target = END_OF[Status(row["status"])]
        made = {}
        # A batch cancelled before it was ever in progress has no lines, only leavings.
        if row["in_progress_at"] is not None:
            made = await self._write(row, UNRUN_CODE.get(target))
        await self._jobs.settle(row, target, made)

    async def _write(self, row: RowMapping, unrun_code: str | None) -> dict[str, dict[str, Any]]:
        """Both files, kept. Returns the file row of each kind that has lines."""
        folder = self._contents.staging_dir
        names = {
            kind: folder / f"{result_file_id(row['id'], kind)}-{uuid4().hex}" for kind in KINDS
        }
        counts = dict.fromkeys(KINDS, 0)
        with Staging(names["output"]) as output, Staging(names["error"]) as error:
            staged = {"output": output, "error": error}
            async for line in self._jobs.outcomes(row["id"]):
                kind = "error" if line["failed"] in (True, None) else "output"
                staged[kind].write(_payload(row["id"], line, unrun_code) + b"\n")
                counts[kind] += 1
            made = {}
            for kind in KINDS:
                staged[kind].finish()
                if counts[kind]:
                    made[kind] = self._file_row(row, kind, staged[kind], counts[kind])
                    await self._contents.keep(staged[kind].path, made[kind]["id"])
        return made

    def _file_row(
        self, row: RowMapping, kind: str, staged: Staging, num_lines: int
    ) -> dict[str, Any]:
        upload = Upload(
            tenant=row["tenant"],
            filename=f"{row['id']}_{kind}.jsonl",
            purpose=BATCH_OUTPUT,
            bytes=staged.path.stat().st_size,
            num_lines=num_lines,
            expires_after_s=row["output_expires_after_s"],
        )
        return file_row(result_file_id(row["id"], kind), upload, self._clock(), READY)


def _payload(batch_id: str, line: RowMapping, unrun_code: str | None) -> bytes:
    if line["payload"] is not None:
        return bytes(line["payload"])
    assert unrun_code is not None, "a completed batch has a result for every line"
    return never_ran(batch_id, line["line_no"], line["custom_id"], unrun_code)
