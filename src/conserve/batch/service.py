"""The batch service as the routes see it: one object for each process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Literal
from uuid import uuid4

from conserve.batch.assembly import Assembly
from conserve.batch.batch_store import expiry_of
from conserve.batch.contents import Staging
from conserve.batch.deadlines import BatchView, RecentHarvest
from conserve.batch.describe import batch_object, file_object, usage_day
from conserve.batch.dispatcher import Dispatcher
from conserve.batch.errors import InvalidRequestError
from conserve.batch.executor import Executor
from conserve.batch.file_store import Upload
from conserve.batch.first_line import first_model
from conserve.batch.intake import Intake
from conserve.batch.outlook import Outlook
from conserve.batch.records import BatchRecord
from conserve.batch.served import Served
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from conserve.batch.validation import BYTES_PER_TOKEN
from conserve.batch.wire import BatchCreate, BatchObject, FileObject, RequestClass, UsageDay
from conserve.batch.worker import Worker


class BatchService:
    """Use as an async context manager: work goes on in the background between enter and exit.

    Every method that takes a tenant raises NotFoundError for what is another's, and any method
    StoreUnavailableError while the database or the file store is away.
    """

    def __init__(
        self,
        settings: BatchSettings,
        executor: Executor,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings
        self._clock = clock
        self._executor = executor
        self.stores = Stores(settings, clock)
        self._served = Served(executor)
        self._worker = Worker(
            self.stores,
            settings,
            Intake(
                self.stores.jobs, self.stores.contents, self.stores.lengths, self._served, settings
            ),
            Assembly(self.stores.jobs, self.stores.files),
            self._served,
            lambda worker_id: Dispatcher(
                worker_id, self.stores, executor, self._served, settings, clock
            ),
            clock,
        )
        self._running: asyncio.Task[None] | None = None

    async def __aenter__(self) -> BatchService:
        self._running = asyncio.create_task(self._worker.run(), name="conserve-batch")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        await self.stores.close()

    async def stop(self) -> None:
        """Feed no more, drain for `drain_s`, give leases back. Harmless when called twice."""
        self._worker.stop()
        if self._running is not None:
            await self._running

    async def models(self) -> frozenset[str] | None:
        """Served here, as they were lately; None is any. Raises StoreUnavailableError."""
        return await self._served.names()

    async def staging(self) -> Staging:
        """A place for an upload to grow in."""
        await self.stores.prepare()
        return Staging(self.settings.staging_dir / f"upload-{uuid4().hex}")

    async def add_file(self, upload: Upload, staged: Path) -> FileObject:
        await self.stores.prepare()
        return file_object(await self.stores.files.add(upload, staged))

    async def file(self, tenant: str, file_id: str) -> FileObject:
        await self.stores.prepare()
        return file_object(await self.stores.files.get(tenant, file_id))

    async def file_page(
        self,
        tenant: str,
        after: str | None,
        limit: int,
        order: Literal["asc", "desc"],
        purpose: str | None,
    ) -> tuple[list[FileObject], bool]:
        await self.stores.prepare()
        files, more = await self.stores.files.page(tenant, after, limit, order, purpose)
        return await asyncio.to_thread(lambda: list(map(file_object, files))), more

    def file_content(self, file: FileObject, span: range | None) -> AsyncIterator[bytes]:
        """The bytes of a file at hand, or those whose places are in `span`, read as they are asked
        for. Raises FileNotFoundError, when they are, for a file that is gone."""
        return self.stores.contents.chunks(file.id, span)

    async def delete_file(self, tenant: str, file_id: str) -> None:
        await self.stores.prepare()
        await self.stores.files.delete(tenant, file_id)

    async def create_batch(
        self, tenant: str, request: BatchCreate, idempotency_key: str | None
    ) -> BatchObject:
        """Raises InvalidRequestError, also where `strict_deadline` cannot be kept."""
        await self.stores.prepare()
        if idempotency_key is not None:
            known = await self.stores.batches.find(tenant, request, idempotency_key)
            if known is not None:  # whatever became of its input since
                return await self._describe(known)
        if not self._executor.serves(request.endpoint):
            message = f"endpoint: this server's model has no {request.endpoint}."
            raise InvalidRequestError(message, code="endpoint_not_served", param="endpoint")
        source = await self.stores.batches.input_file(tenant, request)
        model = await self._model_of(request.input_file_id)
        harvest = await self.stores.harvest.recent()
        output_tokens = await self.stores.lengths.expected(tenant, request.endpoint, model)
        if output_tokens is None:
            output_tokens = harvest.mean_output_tokens or self.settings.default_output_tokens
        tokens = source.bytes / BYTES_PER_TOKEN + source.num_lines * output_tokens
        if request.strict_deadline:
            await self._refuse_infeasible(tenant, request, model, tokens, harvest)
        batch = await self.stores.batches.create(
            tenant, request, idempotency_key, int(tokens), model
        )
        self._changed()
        return await self._describe(batch)

    def _changed(self) -> None:
        self.stores.lookout.forget()
        self._worker.wake()

    async def _model_of(self, file_id: str) -> str | None:
        """Model of the first line: only servers of it may take the batch. None where the line does
        not say, which validation will. Raises InvalidRequestError when it is not served here."""
        chunks = self.stores.contents.chunks(file_id)
        try:
            model = await first_model(chunks, self.settings.max_line_bytes)
        except FileNotFoundError:
            return None
        finally:
            await chunks.aclose()
        served = await self._served.models()
        if model is not None and served is not None and model not in served:
            message = f"input_file_id: its first line names the model {model[:100]!r}, which is "
            message += f"not served here; served: {', '.join(sorted(served)) or 'none'}."
            raise InvalidRequestError(message, code="model_not_found", param="input_file_id")
        return model

    async def _refuse_infeasible(
        self,
        tenant: str,
        request: BatchCreate,
        model: str | None,
        tokens: float,
        harvest: RecentHarvest,
    ) -> None:
        now = self._clock()
        due_at = expiry_of(request, now)
        newcomer = BatchView("", now, request.priority, due_at, tokens, model, tenant=tenant)
        views = [*await self.stores.batches.views(), newcomer]
        standing = await self.stores.shares.standing()
        outlook = Outlook.over(views, now, harvest, standing, self.stores.lookout.served)
        finish_at = outlook.prospects[newcomer.batch_id].finish_at
        if finish_at is not None and finish_at > due_at:
            late_s = int(finish_at - due_at) + 1
            message = (
                f"deadline cannot be kept: at the recent rate the batch would end {late_s} s late. "
                "Give it more time, or leave strict_deadline out to try."
            )
            raise InvalidRequestError(message, code="deadline_infeasible", param="deadline")

    async def batch(self, tenant: str, batch_id: str) -> BatchObject:
        await self.stores.prepare()
        return await self._describe(await self.stores.batches.get(tenant, batch_id))

    async def batch_page(
        self, tenant: str, after: str | None, limit: int
    ) -> tuple[list[BatchObject], bool]:
        await self.stores.prepare()
        batches, more = await self.stores.batches.page(tenant, after, limit)
        return await self._describe_all(batches), more

    async def cancel_batch(self, tenant: str, batch_id: str) -> BatchObject:
        await self.stores.prepare()
        batch = await self.stores.batches.cancel(tenant, batch_id)
        self._changed()
        return await self._describe(batch)

    async def pause_batch(self, tenant: str, batch_id: str) -> BatchObject:
        await self.stores.prepare()
        batch = await self.stores.batches.pause(tenant, batch_id)
        self._changed()
        return await self._describe(batch)

    async def resume_batch(self, tenant: str, batch_id: str) -> BatchObject:
        await self.stores.prepare()
        batch = await self.stores.batches.resume(tenant, batch_id)
        self._changed()
        return await self._describe(batch)

    async def usage(
        self, tenant: str, num_days: int, request_class: RequestClass | None = None
    ) -> list[UsageDay]:
        """What came of the tenant's requests on each of the last days, today's included."""
        await self.stores.prepare()
        today = self.stores.usage.today
        days = await self.stores.usage.days(today - num_days + 1, today, tenant, request_class)
        return [usage_day(day) for day in days]

    async def _describe(self, batch: BatchRecord) -> BatchObject:
        (described,) = await self._describe_all([batch])
        return described

    async def _describe_all(self, batches: Iterable[BatchRecord]) -> list[BatchObject]:
        outlook = await self.stores.lookout.outlook(self._clock())
        return [batch_object(batch, outlook) for batch in batches]
