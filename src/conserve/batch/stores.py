"""The store in one piece: the database, and what each part of the service asks of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy.exc import ArgumentError

from conserve.batch.batch_store import BatchStore
from conserve.batch.contents import FileContents
from conserve.batch.database import Database
from conserve.batch.drivers import check_database_driver, check_files_driver
from conserve.batch.ended import EndedStore
from conserve.batch.errors import BatchSettingsError
from conserve.batch.file_store import FileStore
from conserve.batch.harvest_store import HarvestStore
from conserve.batch.job_store import JobStore
from conserve.batch.lease_store import LeaseStore
from conserve.batch.length_store import LengthStore
from conserve.batch.lookout import Lookout
from conserve.batch.owner_limits import Limits
from conserve.batch.owner_store import OwnerStore
from conserve.batch.private import FOLDER
from conserve.batch.quota import Quota
from conserve.batch.settings import BatchSettings
from conserve.batch.share_store import ShareStore
from conserve.batch.usage_store import UsageStore
from conserve.batch.webhook_store import WebhookStore
from conserve.batch.webhooks import Webhooks
from conserve.batch.worker_store import WorkerStore


class Stores:
    """Raises BatchSettingsError where the settings name a place that cannot be."""

    def __init__(
        self,
        settings: BatchSettings,
        clock: Callable[[], float],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        with _named("data_dir"):
            settings.data_dir.mkdir(FOLDER, parents=True, exist_ok=True)
        with _named("database_url"):
            check_database_driver(settings.resolved_database_url)
            self.database = Database(settings.resolved_database_url)
        with _named("files_url"):
            check_files_driver(settings.resolved_files_url)
            self.contents = FileContents(settings.resolved_files_url, settings.staging_dir)
        with _named("owner_limits"):
            limits = Limits(settings.owner_limits, settings.max_live_batches)
        self.webhooks = Webhooks(
            WebhookStore(self.database, clock), limits.webhook_of, clock, monotonic
        )
        quota = Quota(self.database, limits)
        self.files = FileStore(self.database, self.contents, clock, quota)
        self.batches = BatchStore(self.database, clock, quota)
        self.workers = WorkerStore(self.database, clock, settings.lease_s)
        self.usage = UsageStore(self.database, clock)
        self.shares = ShareStore(self.database, limits.share_of)
        self.leases = LeaseStore(
            self.database, clock, self.shares, self.usage, group_prefixes=settings.group_prefixes
        )
        self.jobs = JobStore(self.database, clock)
        self.ended = EndedStore(self.database)
        self.owners = OwnerStore(self.database, self.files)
        self.harvest = HarvestStore(self.database, clock)
        self.lengths = LengthStore(self.database)
        self.lookout = Lookout(self.batches, self.harvest, self.shares)
        self._prepared = False
        self._preparing = asyncio.Lock()

    async def prepare(self) -> None:
        """Tables and folders, once. Raises StoreUnavailableError: try again later."""
        if self._prepared:
            return
        async with self._preparing:
            if not self._prepared:
                await self.database.migrate()
                await self.contents.prepare()
                self._prepared = True

    async def close(self) -> None:
        await self.database.close()


@contextmanager
def _named(setting: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ImportError, ValueError, ArgumentError) as error:
        raise BatchSettingsError(f"{setting} cannot be used: {error}") from error
