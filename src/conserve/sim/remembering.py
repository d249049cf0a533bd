"""Conversations that pause, as the simulated engine tells `core.chat_memory` of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import chain

from conserve.core.chat_memory import ChatMemory
from conserve.core.learning import Experience
from conserve.core.settings import PolicySettings
from conserve.sim.places import Places
from conserve.sim.request import SimRequest


class Remembering:
    """Joins the places of one engine, and is told of every online request that comes and goes."""

    def __init__(self, places: Places, settings: PolicySettings, experience: Experience) -> None:
        self._places = places
        self._experience = experience
        machine = places.machine
        self._memory = ChatMemory(machine.num_blocks, machine.block_size, settings)
        places.admits = self._admitted
        places.lets_go = self._lets_go
        places.pool.order.forgets = self._forgets

    def room(self, now_s: float) -> int:
        """Free blocks that offline requests which start must leave."""
        places = self._places
        free = places.pool.num_free_blocks
        return self._memory.room(now_s, places.running, free, self._experience.traffic)

    def _admitted(self, request: SimRequest) -> None:
        """For the first time."""
        if request.online:
            names, size = self._names(request, request.num_prompt_tokens), self._block_size
            num_cached = (request.num_cached_tokens or 0) // size
            lost = self._memory.started(names, num_cached, self._experience.model)
            self._places.counters.lost_history_tokens += lost.num_blocks * size
            self._places.counters.lost_history_s += lost.seconds

    def _lets_go(self, request: SimRequest) -> None:
        """Before its blocks are freed."""
        if request.online:
            self._memory.left(self._names(request, request.num_computed_tokens))

    def _forgets(self, blocks: Sequence[int]) -> None:
        """Online history is handed out. Without offline requests chat does that to itself."""
        places = self._places
        # Of those that run, offline requests come last.
        holders = chain(reversed(places.running), places.holding, places.restoring)
        if any(not request.online for request in holders):
            self._memory.driven_out(places.pool.names_of(blocks))

    def _names(self, request: SimRequest, num_tokens: int) -> list[Hashable]:
        size = self._block_size
        return [request.text.name(index, size) for index in range(num_tokens // size)]

    @property
    def _block_size(self) -> int:
        return self._places.machine.block_size
