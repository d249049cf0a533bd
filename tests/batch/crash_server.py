"""A batch server over the fake model, which kills itself (SIGKILL) at a named point.

Run as: crash_server.py PORT_FILE KILL_AT, with the settings in the environment. KILL_AT is
`point:n`, for the n-th time the point is passed, or `never`. Points: `model`, a request reaches the
model; `before-commit` and `after-commit`, of any writing transaction; `before-keep` and
`after-keep`, of a file put in its place.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from conserve.batch.contents import FileContents
from conserve.batch.database import Database
from conserve.batch.executor import asgi_executor
from conserve.batch.settings import BatchSettings
from conserve.server.batches.routes import batch_service
from tests.batch.batch_fakes import FakeModel


class Fuse:
    def __init__(self, kill_at: str) -> None:
        self._point, _, times = kill_at.partition(":")
        self._left = int(times or 0)

    def burn(self, point: str) -> None:
        if point != self._point:
            return
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def wire(fuse: Fuse, model: FakeModel) -> None:
    write, keep = Database.write, FileContents._keep

    @asynccontextmanager
    async def fused_write(self: Database) -> AsyncIterator[Any]:
        async with write(self) as connection:
            yield connection
            fuse.burn("before-commit")
        fuse.burn("after-commit")

    def fused_keep(self: FileContents, staged: Path, blob_id: str) -> None:
        fuse.burn("before-keep")
        keep(self, staged, blob_id)
        fuse.burn("after-keep")

    class FusedSeen(type(model.seen)):  # type: ignore[misc]
        def __setitem__(self, key: str, value: int) -> None:
            fuse.burn("model")
            super().__setitem__(key, value)

    Database.write = fused_write  # type: ignore[method-assign]
    FileContents._keep = fused_keep  # type: ignore[method-assign]
    model.seen = FusedSeen()


async def main(port_file: Path, kill_at: str) -> None:
    model = FakeModel()
    wire(Fuse(kill_at), model)
    server = uvicorn.Server(uvicorn.Config(model.app, port=0, log_level="warning"))
    async with batch_service(BatchSettings(), model.app, asgi_executor(model.app)):
        # uvicorn's own handler ends the process before the service around it has stopped.
        stop = partial(setattr, server, "should_exit", True)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
        serving = asyncio.create_task(server._serve())
        while not server.started:  # noqa: ASYNC110  (uvicorn has no event for it)
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        port_file.with_suffix(".new").write_text(str(port))
        port_file.with_suffix(".new").replace(port_file)
        await serving


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
