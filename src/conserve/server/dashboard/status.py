"""What the server's process knows of its own end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Status:
    """What the process knows of itself: `draining` once it has been told to stop."""

    draining: bool = False
    engine_dead: Callable[[], bool] = lambda: False
    leaving: Callable[[], bool] = lambda: False
    """Whether connections must end now, for the server to stop."""

    def drain(self, timeout_s: float | None) -> float | None:
        """To be called before the engine is shut down; takes none of its time."""
        self.draining = True
        return timeout_s
