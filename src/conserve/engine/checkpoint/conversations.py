"""Online requests that have ended: what the host keeps of them for those that continue them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from conserve.core.latency import LatencyModel
from conserve.core.returning import Returns, span_of
from conserve.engine.checkpoint.entry import Worth
from conserve.engine.checkpoint.pool import HostPool

MOST_SILENT = 1024
"""Conversations remembered; the one that has been silent longest is forgotten first."""
LOOK_S = 1.0
"""Between two looks at what each of them is worth."""


@dataclass(slots=True)
class Silence:
    """Of a conversation: nobody asks for its KV."""

    request_id: str
    """Whose entry in the pool holds what is kept of it, if any is."""
    since_s: float
    span: int = 0
    """The last one that has been counted."""


class Conversations:
    """Which of them are silent, and how likely they are to go on.

    A request continues an ended one if it begins with all full blocks of that one's prompt. Of
    two that begin alike the pool keeps the longer, under the name of the request that left it.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._returns = Returns()
        self._silent: dict[Hashable, Silence] = {}
        """By the hash of the last full block of the prompt; the newest last."""
        self._going_on: dict[str, Silence] = {}
        """By the request that continues it."""
        self._now_s = 0.0
        self._next_look_s = 0.0

    def chance(self) -> float:
        """That a request which is running is continued once it has ended."""
        return self._returns.chance()

    def came(self, request: Any, now_s: float) -> None:
        """An online request has arrived, and continues a conversation, maybe."""
        silent = self._silent
        block_hash = next((h for h in reversed(request.block_hashes) if h in silent), None)
        if block_hash is None:
            return
        silence = silent.pop(block_hash)
        self._count_spans(silence, now_s)
        self._returns.ended(silence.span)
        self._going_on[request.request_id] = silence

    def ended(self, request: Any, pool: HostPool) -> None:
        """An online request has ended: what the pool has of it stays, until it must make room."""
        name = request.request_id
        pool.keep(name, request.block_hashes)
        before = self._going_on.pop(name, None)
        index = request.num_prompt_tokens // self._block_size - 1
        if not 0 <= index < len(request.block_hashes):
            pool.drop(name)
            return
        block_hash = request.block_hashes[index]
        for old in (before, self._silent.pop(block_hash, None)):
            if old is not None and old.request_id != name:
                name = _longer(name, old.request_id, pool)
        self._silent[block_hash] = Silence(name, self._now_s)
        self._returns.reached(0)
        if len(self._silent) > MOST_SILENT:
            pool.drop(self._silent.pop(next(iter(self._silent))).request_id)

    def look(self, now_s: float, model: LatencyModel, pool: HostPool) -> None:
        """Say now and then how late it is, and rate what the pool keeps by it. Cheap between."""
        self._now_s = now_s
        if now_s < self._next_look_s:
            return
        self._next_look_s = now_s + LOOK_S
        for silence in self._silent.values():
            self._count_spans(silence, now_s)
            num_tokens = pool.num_covered_tokens(silence.request_id)
            if num_tokens:
                chance = self._returns.chance(now_s - silence.since_s)
                worth = Worth(chance * model.predict_prefill_s(num_tokens))
                pool.rate(silence.request_id, worth)

    def _count_spans(self, silence: Silence, now_s: float) -> None:
        while silence.span < span_of(now_s - silence.since_s):
            silence.span += 1
            self._returns.reached(silence.span)

    def forget(self) -> None:
        """Nothing is kept of any of them; how likely they go on is no other for that."""
        self._silent.clear()
        self._going_on.clear()


def _longer(name: str, other: str, pool: HostPool) -> str:
    """Whose entry of the two holds more; the other's goes, since they begin alike."""
    if pool.num_covered_tokens(other) > pool.num_covered_tokens(name):
        name, other = other, name
    pool.drop(other)
    return name
