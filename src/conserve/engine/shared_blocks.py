"""Blocks that several requests hold, read from vLLM's block tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, dropwhile, takewhile
from typing import Any

from conserve.core.kv_groups import KVGroups
from conserve.core.sharing import Table, arrivals_lack_room, note_sharing, num_lasting
from conserve.core.snapshot import RequestView, Sharing
from conserve.engine.queue import is_online
from conserve.engine.scheduler_view import SchedulerView


class SharedBlocks:
    """Says who shares blocks, where an arrival may need them. Changes nothing."""

    def __init__(self, scheduler: SchedulerView, groups: KVGroups | None) -> None:
        self._scheduler = scheduler
        self._memory = groups or scheduler.block_size

    def look(
        self, waiting_online: Sequence[RequestView], num_free_blocks: int, num_free_slots: int
    ) -> Sharing:
        if not arrivals_lack_room(waiting_online, num_free_blocks, num_free_slots, self._memory):
            return Sharing()
        offline = [r.request_id for r in self._scheduler.running if not is_online(r)]
        return note_sharing(
            ((name, self._shared(name)) for name in offline),
            {v.request_id: self._num_lasting(v) for v in waiting_online if v.num_borrowed_blocks},
        )

    def _tables(self, request_id: str) -> Iterator[Iterable[Any]]:
        """The request's blocks by group, without those that its windows have left."""
        coordinator = self._scheduler.kv_cache_manager.coordinator
        for manager in coordinator.single_type_managers:
            yield dropwhile(_is_null, manager.req_to_blocks.get(request_id, ()))

    def _shared(self, request_id: str) -> Table:
        """Of all groups: requests share leading blocks in each."""
        leading = (takewhile(_is_shared, table) for table in self._tables(request_id))
        return [(block.block_id, block.ref_cnt) for block in chain.from_iterable(leading)]

    def _num_lasting(self, view: RequestView) -> int:
        """Of the blocks that a waiting request finds, those that a running online one holds."""
        scheduler = self._scheduler
        request = scheduler.requests[view.request_id]
        found = scheduler.kv_cache_manager.coordinator.find_longest_cache_hit(
            request.block_hashes, request.num_tokens - 1
        )[0]
        online = [r.request_id for r in scheduler.running if is_online(r)]
        return sum(
            num_lasting(
                [block.block_id for block in blocks if not block.is_null],
                ([b.block_id for b in tables[number]] for tables in map(self._listed, online)),
            )
            for number, blocks in enumerate(found)
        )

    def _listed(self, request_id: str) -> list[list[Any]]:
        return [list(table) for table in self._tables(request_id)]


def _is_null(block: Any) -> bool:
    return bool(block.is_null)


def _is_shared(block: Any) -> bool:
    return bool(block.ref_cnt > 1)
