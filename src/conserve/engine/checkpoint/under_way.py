"""Copies that the workers have been given and that are not over on all ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from conserve.engine.checkpoint.entry import Span
from conserve.engine.checkpoint.orders import Ended, Job

BlockIds = Sequence[Sequence[int]]
"""A request's blocks by KV group, in the order of its tokens."""
Holds = Callable[[str, int, int], bool]
"""(request, KV group, index): whether the request's window has not left that block."""


@dataclass(slots=True)
class Sent:
    """One of them."""

    job: Job
    request: Any
    num_tokens: int
    """Leading tokens of the request that it makes whole, on the host or on the device."""
    dropped: bool = False
    """Whatever becomes of it, it counts for nothing."""
    outlived: bool = False
    """Its request has ended."""
    ended: Ended = field(default_factory=lambda: Ended(num_ranks=0))
    brings: Mapping[str, int] = field(default_factory=dict)
    """Of a load: tier -> tokens out of it."""
    oldest: Mapping[int, int] = field(default_factory=dict)
    """Of copies out of windows: KV group -> the index of the request's block that leaves first."""

    def has_left(self, holds: Holds) -> bool:
        """Whether some of it has changed hands since."""
        name = self.request.request_id
        return not all(holds(name, group, index) for group, index in self.oldest.items())


class UnderWay:
    """All of them, found by number and by request."""

    def __init__(self) -> None:
        self._by_number: dict[int, Sent] = {}
        self._by_request: defaultdict[str, dict[int, Sent]] = defaultdict(dict)
        """The same; no entry is empty."""
        self._last_number = 0

    def __len__(self) -> int:
        return len(self._by_number)

    def __iter__(self) -> Iterator[Sent]:
        return iter(self._by_number.values())

    def begin(
        self,
        request: Any,
        num_tokens: int,
        spans: Sequence[Span],
        block_ids: BlockIds,
        *,
        store: bool,
    ) -> Sent:
        """A new one, of those blocks of the request's and their slots."""
        self._last_number += 1
        blocks = [block_ids[span.group][span.index] for span in spans]
        job = Job(self._last_number, store, blocks, [span.slot for span in spans])
        sent = Sent(job, request, num_tokens)
        self.add(sent)
        return sent

    def add(self, sent: Sent) -> None:
        number, name = sent.job.number, sent.request.request_id
        self._by_number[number] = self._by_request[name][number] = sent

    def get(self, number: int) -> Sent | None:
        return self._by_number.get(number)

    def remove(self, sent: Sent) -> None:
        number, name = sent.job.number, sent.request.request_id
        del self._by_number[number], self._by_request[name][number]
        if not self._by_request[name]:
            del self._by_request[name]

    def clear(self) -> None:
        self._by_number.clear()
        self._by_request.clear()

    def of(self, request_id: str, *, store: bool) -> list[Sent]:
        """The request's copies in one direction, in the order they were sent."""
        found = self._by_request.get(request_id, {}).values()
        return [sent for sent in found if sent.job.store is store]

    def left_behind(self, holds: Holds) -> set[str]:
        """Requests whose windows have left blocks that copies are under way out of."""
        return {sent.request.request_id for sent in self if sent.has_left(holds)}

    def num_slots(self, *, store: bool) -> int:
        return sum(len(sent.job.slots) for sent in self if sent.job.store is store)
