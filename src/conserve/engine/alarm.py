"""A thread that calls somebody at a moment that may be put off, or never come."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable


class Alarm:
    """Rings once at the moment it was set to last. Its thread begins with the first such moment,
    and sleeps but for them: putting one off or switching it off wakes nobody."""

    def __init__(self, clock: Callable[[], float], ring: Callable[[], None]) -> None:
        """`ring` is called in the alarm's own thread, which holds no lock meanwhile."""
        self._clock = clock
        self._ring = ring
        self._changed = threading.Condition()
        self._at_s = math.inf
        self._asleep_until_s = math.inf
        """When the thread looks at the clock next, whatever has become of the moment."""
        self._thread: threading.Thread | None = None
        self._closed = False

    def set(self, at_s: float) -> None:
        """Ring at `at_s` by the clock, and not when it was set to before; infinity: not at all."""
        with self._changed:
            self._at_s = at_s
            if at_s == math.inf or self._closed:
                return
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="conserve-alarm", daemon=True
                )
                self._thread.start()
            elif at_s < self._asleep_until_s:
                self._changed.notify()

    def close(self) -> None:
        """End the thread; no ring begins any more. Not to be called by `ring`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while self._sleeps_until_due():
            self._ring()

    def _sleeps_until_due(self) -> bool:
        """False once it is closed."""
        with self._changed:
            while not self._closed:
                left_s = self._at_s - self._clock()
                if left_s <= 0:
                    self._at_s = math.inf
                    return True
                self._asleep_until_s = self._at_s
                self._changed.wait(min(left_s, threading.TIMEOUT_MAX))
            return False
