"""Memory of the host that a device copies from and to by itself, made in the background.

Pinning takes a second for a few GB, and tens of seconds for what a large pool asks for; meanwhile
the driver keeps waiting whoever asks it for something, in other processes too. So it is done in a
thread of its own, section by section, from when vLLM has made its KV caches. The thread rests
between sections, and can be told to hold still.
"""

from __future__ import annotations

import math
import mmap
import time
from contextlib import suppress
from threading import Condition, Thread
from typing import Protocol

import torch

from conserve.engine.door import init_logger

logger = init_logger("vllm.conserve")

SECTION_BYTES = 64 << 20
"""So little that nobody is kept waiting for long."""
SLOW_S = 1.0
"""What a section's pages take where the host's memory is in pieces, and the kernel moves others'
about to make huge pages: a hundred times as long as it should."""


class Pinning(Protocol):
    """Of a device, called by one thread; `pin` begins at a page of memory and ends at one."""

    def prepare_thread(self) -> None: ...
    def pin(self, address: int, num_bytes: int) -> None:
        """Raises MemoryError."""

    def unpin(self, address: int) -> None: ...


class PinnedMemory:
    """Room for `num_slots` slots of `slot_bytes`, or as much of it as can be had. `is_ready` once
    nothing more comes; what there is by then is `memory`, pinned in sections of
    `slots_per_section`."""

    def __init__(self, num_slots: int, slot_bytes: int, pinning: Pinning) -> None:
        """Raises MemoryError where there is no address space for it."""
        self.slot_bytes = slot_bytes
        self.slots_per_section = _slots_per_section(slot_bytes)
        self.why_not = ""
        """Why it is less than was asked for."""
        self.is_ready = False
        self._pinning = pinning
        self._pages: mmap.mmap | None = _reserve(num_slots * slot_bytes)
        self._all = torch.frombuffer(self._pages, dtype=torch.int8)
        self._num_bytes = num_slots * slot_bytes
        self._pinned: list[int] = []
        """Addresses of sections."""
        self._changed = Condition()
        self._is_still = self._is_pinning = self._closed = False
        self._thread = Thread(target=self._run, name="conserve-pinning", daemon=True)
        self._thread.start()

    @property
    def memory(self) -> torch.Tensor:
        num_bytes = len(self._pinned) * self.slots_per_section * self.slot_bytes
        return self._all[: min(num_bytes, self._num_bytes)]

    def hold(self, *, still: bool) -> None:
        """Pin nothing until told otherwise. What has begun is waited for."""
        with self._changed:
            self._is_still = still
            self._changed.notify_all()
            if still:
                self._changed.wait_for(lambda: not self._is_pinning)

    def close(self) -> None:
        """Unpin all of it and give it back. Nothing may be copying."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        for address in self._pinned:
            self._pinning.unpin(address)
        self._pinned, self._num_bytes, self._pages = [], 0, None
        self._all = torch.empty(0, dtype=torch.int8)

    def _run(self) -> None:
        started_s = time.monotonic()
        try:
            self._pinning.prepare_thread()
            self._pin_all()
        except Exception as error:  # the engine goes on with what there is
            self.why_not = str(error) or type(error).__name__
        if not self._closed:
            logger.info(
                "ConServe: %.2f GiB of host memory pinned for checkpoints, in %.1f s%s",
                len(self.memory) / 2**30,
                time.monotonic() - started_s,
                f"; no more could be had: {self.why_not}" if self.why_not else "",
            )
        self.is_ready = True

    def _pin_all(self) -> None:
        section_bytes = self.slots_per_section * self.slot_bytes
        for start in range(0, len(self._all), section_bytes):
            num_bytes = min(section_bytes, len(self._all) - start)
            if not self._may_begin():
                return
            self._touch(start, num_bytes)
            if not self._may_begin(pinning=True):
                return
            seconds = self._pin(start, num_bytes)
            # Without a rest those who wait would hardly have a turn.
            time.sleep(seconds)

    def _may_begin(self, *, pinning: bool = False) -> bool:
        """When it need not hold still any more; False where it has been closed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_still or self._closed)
            self._is_pinning = pinning and not self._closed
            return not self._closed

    def _touch(self, start: int, num_bytes: int) -> None:
        """Have the pages come into being. The driver would do that itself, with everybody waiting,
        and it takes most of the time."""
        started_s = time.monotonic()
        self._all.numpy()[start : start + num_bytes : mmap.PAGESIZE] = 0
        if time.monotonic() - started_s > SLOW_S and self._pages is not None:
            _advise(self._pages, mmap.MADV_NOHUGEPAGE)

    def _pin(self, start: int, num_bytes: int) -> float:
        """Returns the seconds it took."""
        started_s, address = time.monotonic(), self._all.data_ptr() + start
        try:
            self._pinning.pin(address, num_bytes)
            self._pinned.append(address)
        finally:
            with self._changed:
                self._is_pinning = False
                self._changed.notify_all()
        return time.monotonic() - started_s


def _slots_per_section(slot_bytes: int) -> int:
    """Sections begin and end between slots and between pages: no page is pinned twice."""
    least = math.lcm(slot_bytes, mmap.PAGESIZE)
    return least // slot_bytes * max(1, SECTION_BYTES // least)


def _reserve(num_bytes: int) -> mmap.mmap:
    """Whole pages, which come into being when they are touched. They are this process's alone: with
    a child forked off, the kernel would copy every pinned page for it at once or, an older one,
    leave the device with pages that are the child's by then."""
    whole = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    try:
        pages = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise MemoryError(f"--checkpoint-bytes: no {num_bytes} bytes of memory") from error
    _advise(pages, mmap.MADV_DONTFORK)
    _advise(pages, mmap.MADV_HUGEPAGE)
    return pages


def _advise(pages: mmap.mmap, advice: int) -> None:
    with suppress(OSError):  # a kernel without huge pages
        pages.madvise(advice)
