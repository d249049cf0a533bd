"""A trace in memory: a column for each value, so that tens of millions of requests fit."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]
Ids = NDArray[np.uint64]

MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace: seconds since the trace's first request, tokens in and out.

    prefix_ids: Mooncake's ids of the prompt's blocks of tokens; equal ids are equal text.
    """

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    prefix_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens in and out, request by request. num_failed: requests that the trace has beside
    these, and that got no answer."""

    prompt: Ints
    output: Ints
    num_failed: int = 0

    def __len__(self) -> int:
        return len(self.prompt)

    def pair(self, i: int) -> tuple[int, int]:
        return int(self.prompt[i]), int(self.output[i])


@dataclass(frozen=True, slots=True, eq=False)
class Trace(Sequence[TraceRow]):
    """Requests by arrival, the first at 0; 16 bytes each, and 8 for each prefix id.

    Row i's prefix ids are those before `prefix_ends[i]` and from the row before's end on; both
    are empty where no request has any.
    """

    arrival_s: Floats
    tokens: TokenCounts
    prefix_ids: Ids
    prefix_ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.arrival_s)

    @overload
    def __getitem__(self, index: int) -> TraceRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TraceRow]: ...
    def __getitem__(self, index: int | slice) -> TraceRow | list[TraceRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        return TraceRow(float(self.arrival_s[i]), *self.tokens.pair(i), self._prefix(i))

    def __iter__(self) -> Iterator[TraceRow]:
        return (self[i] for i in range(len(self)))

    def _prefix(self, i: int) -> tuple[int, ...]:
        if not len(self.prefix_ends):
            return ()
        start = self.prefix_ends[i - 1] if i else 0
        return tuple(self.prefix_ids[start : self.prefix_ends[i]].tolist())


@dataclass
class Columns:
    """What a reader fills, request by request, in the order of its file."""

    arrival_s: array[float] = field(default_factory=lambda: array("d"))
    prompt: array[int] = field(default_factory=lambda: array("i"))
    output: array[int] = field(default_factory=lambda: array("i"))
    prefix_ids: array[int] = field(default_factory=lambda: array("Q"))
    prefix_ends: array[int] = field(default_factory=lambda: array("q"))
    num_failed: int = 0

    def counts(self) -> TokenCounts:
        prompt, output = _frozen(self.prompt, np.int32), _frozen(self.output, np.int32)
        return TokenCounts(prompt, output, self.num_failed)

    def trace(self) -> Trace:
        arrival_s = _frozen(self.arrival_s, np.float64)
        ids, ends = _frozen(self.prefix_ids, np.uint64), _frozen(self.prefix_ends, np.int64)
        trace = Trace(arrival_s, self.counts(), ids, ends)
        if np.any(arrival_s[1:] < arrival_s[:-1]):
            trace = chosen(trace, np.argsort(arrival_s, kind="stable"))
        return replace(trace, arrival_s=trace.arrival_s - trace.arrival_s[0])


def chosen(trace: Trace, rows: NDArray[np.intp]) -> Trace:
    """The rows with these numbers, in this order."""
    tokens = trace.tokens
    counts = TokenCounts(tokens.prompt[rows], tokens.output[rows], tokens.num_failed)
    ids, ends = trace.prefix_ids, trace.prefix_ends
    if len(ends):
        starts = np.concatenate([[0], ends[:-1]])
        parts = [ids[starts[row] : ends[row]] for row in rows]
        ids, ends = np.concatenate([ids[:0], *parts]), np.cumsum((ends - starts)[rows])
    return Trace(trace.arrival_s[rows], counts, ids, ends)


def _frozen(column: array[Any], dtype: Any) -> NDArray[Any]:
    """The same memory, not to be written."""
    values = np.frombuffer(column, dtype=dtype)
    values.flags.writeable = False
    return values
