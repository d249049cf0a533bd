"""The life of a batch: its states, and the only table of moves between them. States of files and
lines, too."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from conserve.batch.errors import BadTransitionError


class Status(StrEnum):
    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


TRANSITIONS: Mapping[Status, frozenset[Status]] = {
    Status.VALIDATING: frozenset(
        {Status.FAILED, Status.IN_PROGRESS, Status.EXPIRED, Status.CANCELLING}
    ),
    Status.IN_PROGRESS: frozenset(
        {Status.FAILED, Status.FINALIZING, Status.EXPIRED, Status.CANCELLING}
    ),
    Status.FINALIZING: frozenset({Status.FAILED, Status.COMPLETED, Status.CANCELLING}),
    Status.CANCELLING: frozenset({Status.FAILED, Status.CANCELLED}),
    Status.FAILED: frozenset(),
    Status.COMPLETED: frozenset(),
    Status.EXPIRED: frozenset(),
    Status.CANCELLED: frozenset(),
}

TERMINAL = frozenset(status for status, nexts in TRANSITIONS.items() if not nexts)
LIVE = frozenset(Status) - TERMINAL
PAUSABLE = frozenset({Status.VALIDATING, Status.IN_PROGRESS})
"""States in which a batch may have lines to run, later or now; a pause keeps them from it, and
moves no status."""
CANCELLABLE = frozenset(s for s, nexts in TRANSITIONS.items() if Status.CANCELLING in nexts)


class FileState(StrEnum):
    """The blob of a file may be missing while it is uploading, and gone while it is deleting."""

    UPLOADING = "uploading"
    READY = "ready"
    DELETING = "deleting"


class LineState(StrEnum):
    """A line waits, is leased to one worker, or has its result stored."""

    PENDING = "pending"
    LEASED = "leased"
    DONE = "done"


def check(current: Status, target: Status) -> None:
    """Raises BadTransitionError unless the table has the edge."""
    if target not in TRANSITIONS[current]:
        raise BadTransitionError(f"a batch cannot go from {current} to {target}")
