"""The first job of a batch: validate its file and put its lines down."""

from __future__ import annotations

from conserve.batch.contents import FileContents
from conserve.batch.job_store import JobStore
from conserve.batch.length_store import LengthStore
from conserve.batch.records import BatchRecord
from conserve.batch.rules import Rules
from conserve.batch.served import Served
from conserve.batch.settings import BatchSettings
from conserve.batch.validation import LineIndex, Validation
from conserve.batch.wire import LineErrorObject

ROWS_AT_ONCE = 500


class Intake:
    """Runs in turns with the event loop: no slice of work is longer than one chunk of the file."""

    def __init__(
        self,
        jobs: JobStore,
        contents: FileContents,
        lengths: LengthStore,
        served: Served,
        settings: BatchSettings,
    ) -> None:
        self._jobs = jobs
        self._lengths = lengths
        self._contents = contents
        self._served = served
        self._settings = settings

    async def run(self, batch: BatchRecord) -> None:
        """Move a batch from validating to in_progress, or to failed with a list of reasons.

        Raises LeaseLostError when the batch is cancelled meanwhile or taken over.
        """
        rules = await self._rules(batch)
        await self._jobs.clear_lines(batch)
        validation = Validation(rules)
        try:
            await self._index(batch, validation)
        except FileNotFoundError:
            gone = LineErrorObject(code="file_not_found", message="The input file is gone.")
            await self._jobs.refuse(batch, [gone])
            return
        if validation.errors:
            await self._jobs.refuse(batch, validation.errors)
        else:
            await self._jobs.accept(batch, validation)

    async def _rules(self, batch: BatchRecord) -> Rules:
        mean = await self._lengths.expected(batch.tenant, batch.endpoint, batch.model)
        return Rules(
            endpoint=batch.endpoint,
            models=await self._served.models(),
            max_lines=self._settings.max_lines,
            max_line_bytes=self._settings.max_line_bytes,
            default_output_tokens=self._settings.default_output_tokens,
            mean_output_tokens=mean,
        )

    async def _index(self, batch: BatchRecord, validation: Validation) -> None:
        found: list[LineIndex] = []
        async for chunk in self._contents.chunks(batch.input_file_id):
            found.extend(validation.feed(chunk))
            if validation.done_early:
                return
            if len(found) >= ROWS_AT_ONCE:
                await self._put(batch, found, validation)
                found = []
        found.extend(validation.finish())
        await self._put(batch, found, validation)

    async def _put(
        self, batch: BatchRecord, found: list[LineIndex], validation: Validation
    ) -> None:
        # The lines of a file that is refused anyway are of no use.
        if found and not validation.errors:
            await self._jobs.add_lines(batch, found)
