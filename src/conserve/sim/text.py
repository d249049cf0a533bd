"""What requests say, as far as it decides which of them begin alike."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable
from hashlib import blake2b

from conserve.workload import RequestPlan

Parts = tuple[tuple[str, int], ...]


class Text:
    """The tokens of a request: named texts in turn, and then the endless one called `stream`.

    Requests of one stream have the same prefix: they are turns of one conversation.
    """

    __slots__ = ("_names", "_prefix", "_prefix_tokens", "shared", "stream")

    def __init__(self, stream: str, prefix: Parts = (), *, shared: bool = False) -> None:
        self.stream = stream
        self.shared = shared or bool(prefix)
        """Whether another request may begin with the same tokens."""
        self._prefix = prefix
        self._prefix_tokens = sum(num_tokens for _, num_tokens in prefix)
        self._names: list[bytes] = []

    @classmethod
    def of(cls, plan: RequestPlan) -> Text:
        return cls(plan.session or plan.request_id, plan.prefix, shared=bool(plan.session))

    def name(self, index: int, block_size: int) -> Hashable:
        """Names the block of that index and all before it: equal names are equal tokens. For one
        block size in a text's life."""
        if index * block_size >= self._prefix_tokens:
            return self.stream, index
        while len(self._names) <= index:
            self._names.append(self._digest(len(self._names), block_size))
        return self._names[index]

    def num_common(self, other: Text, most: int, block_size: int) -> int:
        """Leading blocks that both have, up to `most`."""
        if not most or self.name(0, block_size) != other.name(0, block_size):
            return 0
        return bisect_left(
            range(most), True, key=lambda i: self.name(i, block_size) != other.name(i, block_size)
        )

    def _digest(self, index: int, block_size: int) -> bytes:
        before = self._names[index - 1] if index else b""
        said = repr(self._within(index * block_size, (index + 1) * block_size))
        return blake2b(before + said.encode(), digest_size=16).digest()

    def _within(self, start: int, end: int) -> list[tuple[str, int, int]]:
        """The parts of [start, end), each with its own range of tokens."""
        parts, at = [], 0
        for name, num_tokens in (*self._prefix, (self.stream, max(end - self._prefix_tokens, 0))):
            first, last = max(start, at), min(end, at + num_tokens)
            if first < last:
                parts.append((name, first - at, last - at))
            at += num_tokens
        return parts
