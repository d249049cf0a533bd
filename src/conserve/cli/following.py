"""A batch watched to its end, over restarts of its server."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from conserve.batch.lifecycle import TERMINAL
from conserve.batch.printable import printable
from conserve.cli.batch_view import counts, progress_bar, progress_note
from conserve.cli.failures import fail, note, notes
from conserve.cli.remote import AwayError, Server, batch_path

LOOK_TIMEOUT_S = 30.0

EveryOption = Annotated[float, typer.Option(min=0.01, max=86_400, help="Seconds between looks.")]
PatienceOption = Annotated[
    float, typer.Option(min=0, help="Seconds to wait for a server that has gone away.")
]


@dataclass
class Looks:
    """Looks at one batch. A server that has answered once, `heard_s` by the monotonic clock, may be
    away for `patience_s`."""

    server: Server
    batch_id: str
    patience_s: float
    heard_s: float | None = None
    _away: bool = field(default=False)

    def look(self) -> Any | None:
        """The batch; None while its server is away. Ends the command where that is too long."""
        try:
            batch = self.server.ask("GET", batch_path(self.batch_id), timeout=LOOK_TIMEOUT_S)
        except AwayError as error:
            self._bear(error)
            return None
        if self._away:
            note("the server is back")
        self.heard_s, self._away = time.monotonic(), False
        return batch

    def _bear(self, error: AwayError) -> None:
        if self.heard_s is None:
            raise fail(str(error)) from None
        if time.monotonic() - self.heard_s >= self.patience_s:
            raise fail(f"{error}; gave up after {self.patience_s:g} s") from None
        if not self._away:
            note(f"{error}; waiting for the server")
        self._away = True


def follow(looks: Looks, every_s: float) -> Any:
    """The batch at its end; progress is shown meanwhile on a terminal."""
    with progress_bar(notes) as progress:
        task = progress.add_task("waiting", total=None, note="")
        while (batch := looks.look()) is None or batch["status"] not in TERMINAL:
            if batch is None:
                progress.update(task, note="waiting for the server")
            else:
                done, failed, total = counts(batch)
                progress.update(
                    task,
                    description=printable(batch["status"]),
                    completed=done + failed,
                    total=total or None,
                    note=progress_note(batch),
                )
            time.sleep(every_s)
    return batch
