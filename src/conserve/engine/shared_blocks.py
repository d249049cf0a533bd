"""Blocks that several requests hold, read from vLLM's block tables."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import chain, islice, takewhile
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
        self._managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        self._keep_all = (
            [group.keeps_all for group in groups.groups]
            if groups
            else [True for _ in self._managers]
        )

    def look(
        self,
        waiting_online: Sequence[RequestView],
        running: Sequence[RequestView],
        num_free_blocks: int,
        num_free_slots: int,
    ) -> Sharing:
        if not arrivals_lack_room(
            waiting_online, running, num_free_blocks, num_free_slots, self._memory
        ):
            return Sharing()
        offline = [r.request_id for r in self._scheduler.running if not is_online(r)]
        return note_sharing(
            ((name, self._shared(name)) for name in offline),
            {v.request_id: self._num_lasting(v) for v in waiting_online if v.num_borrowed_blocks},
        )

    def _shared(self, request_id: str) -> Table:
        """Requests share the tokens that they begin with. Of a window one may have left some that
        another holds still: in its table, those of both may stand behind others."""
        tables = [manager.req_to_blocks.get(request_id, ()) for manager in self._managers]
        whole = [table for table, keeps in zip(tables, self._keep_all, strict=True) if keeps]
        found = [block for table in whole for block in takewhile(_is_shared, table)]
        if found or not whole:
            windows = (t for t, keeps in zip(tables, self._keep_all, strict=True) if not keeps)
            held = chain.from_iterable(islice(t, _num_left(t), None) for t in windows)
            found += [block for block in held if block.ref_cnt > 1 and not block.is_null]
        return [(block.block_id, block.ref_cnt) for block in found]

    def _num_lasting(self, view: RequestView) -> int:
        """Of the blocks that a waiting request finds, those that a running online one holds."""
        scheduler, num = self._scheduler, 0
        request = scheduler.requests[view.request_id]
        found = scheduler.kv_cache_manager.coordinator.find_longest_cache_hit(
            request.block_hashes, request.num_tokens - 1
        )[0]
        online = [r.request_id for r in scheduler.running if is_online(r)]
        for manager, blocks in zip(self._managers, found, strict=True):
            first, tables = _num_left(blocks), manager.req_to_blocks
            held = (map(_id_of, islice(tables.get(name, ()), first, None)) for name in online)
            num += num_lasting(map(_id_of, blocks[first:]), held)
        return num


def _num_left(blocks: Sequence[Any]) -> int:
    """Blocks that a window has left. They come first, and may be thousands."""
    return bisect_left(blocks, True, key=_is_there)


def _id_of(block: Any) -> int:
    return int(block.block_id)


def _is_there(block: Any) -> bool:
    return not block.is_null


def _is_shared(block: Any) -> bool:
    return bool(block.ref_cnt > 1)
