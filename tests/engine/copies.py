"""The worker's half of checkpoints over the pretend device: copies that dawdle and are checked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from conserve.engine.checkpoint.copier import BlockCopies
from conserve.engine.checkpoint.copy_queue import CopyQueue
from conserve.engine.checkpoint.orders import Orders, Report
from conserve.engine.checkpoint.pieces import Piece
from conserve.engine.checkpoint.sizes import PoolSize
from conserve.engine.settings import EngineSettings
from tests.engine.device import Device, chain


class ForeignCopyError(AssertionError):
    """A copy read a block that does not hold its request's KV (P2)."""


class PretendStore:
    """Slots behind the pretend device, block by block; `fail` names operations to fail."""

    def __init__(self, device: Device, fail: Any = None) -> None:
        self.device = device
        self.slots: dict[int, list[int | None]] = {}
        self.fail = fail or (lambda operation: False)

    def write(
        self,
        block_ids: Sequence[int],
        slots: Sequence[int],
        ranges: Sequence[tuple[int, int]] | None = None,
    ) -> set[int]:
        # Of the largest blocks, where groups have blocks of several sizes.
        size = max(group.block_size for group in self.device.groups)
        ranges = ranges or [(0, size)] * len(slots)
        for block, slot, (start, stop) in zip(block_ids, slots, ranges, strict=True):
            if self.fail("store"):
                self.slots.pop(slot, None)
                return {slot}
            content = self.slots.setdefault(slot, [None] * size)
            content[start:stop] = [self.device.slots.get((block, i)) for i in range(start, stop)]
        return set()

    def read(self, slots: Sequence[int], block_ids: Sequence[int]) -> set[int]:
        for block, slot in zip(block_ids, slots, strict=True):
            if self.fail("load") or slot not in self.slots:
                return {slot}
            for i, value in enumerate(self.slots[slot]):
                self.device.slots[(block, i)] = value if value is not None else -2
        return set()

    def move(self, moves: Sequence[tuple[int, int]]) -> set[int]:
        lost = set()
        for source, target in moves:
            if self.fail("move") or source not in self.slots:
                lost.add(target)
            else:
                self.slots[target] = list(self.slots[source])
        return lost


class CheckedCopies(BlockCopies):
    """Compares every block it is about to copy with what its request's KV should be."""

    def __init__(self, store: PretendStore, scheduler: Any, device: Device) -> None:
        super().__init__(CopyQueue(block_bytes=512), store)
        self.scheduler, self.device = scheduler, device
        self.num_stored = self.num_loaded = 0
        self._sent: dict[int, Any] = {}
        self._note_what_is_sent()

    def _note_what_is_sent(self) -> None:
        """The scheduler may have forgotten of a copy that goes on."""
        under_way = self.scheduler.checkpointer.under_way
        add = under_way.add

        def note(sent: Any) -> None:
            self._sent[sent.job.number] = sent
            add(sent)

        under_way.add = note

    def copy(self, piece: Piece) -> set[int]:
        if piece.job.store:
            self._check(piece)
            self.num_stored += 1
        else:
            self.num_loaded += 1
        return super().copy(piece)

    def _check(self, piece: Piece) -> None:
        number = piece.job.number
        sent = self._sent[number]
        tokens = list(sent.request.all_token_ids)
        wanted = hashes_of(tokens[: sent.num_tokens], self.device.weights)
        (block,) = piece.block_ids
        for other, group in enumerate(self.device.groups):
            size = group.block_size
            if group.is_state:
                state = self.device.slots.get((block, 0), 0) - other
                if state == wanted[-1]:
                    return
                continue
            found = [self.device.slots.get((block, i), 0) - other for i in range(size)]
            # The block's index in the request: where its hashes stand.
            starts = range(0, len(wanted), size)
            if any(found[: len(wanted[at : at + size])] == wanted[at : at + size] for at in starts):
                return
        raise ForeignCopyError(f"job {number} of {sent.request.request_id}: block {block}")


def rank_is_ready(scheduler: Any) -> None:
    """What a rank reports once it has its pool."""
    config = scheduler.vllm_config
    settings = EngineSettings.of(config.additional_config)
    size = PoolSize.of(config, scheduler.kv_cache_config, settings)
    scheduler.checkpointer.take(Report(pools=[size.num_slots]))


class Ranks:
    """Devices that run every step together, their outputs aggregated as vLLM does it."""

    def __init__(self, devices: Sequence[Device]) -> None:
        from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator

        self.devices = devices
        self.connector = devices[0].connector
        self._aggregator = KVOutputAggregator(len(devices))

    def run(self, output: Any, stop_at: int | None = None) -> Any:
        outputs = [device.run(output, stop_at) for device in self.devices]
        assert all(o.sampled_token_ids == outputs[0].sampled_token_ids for o in outputs)
        return self._aggregator.aggregate(outputs)


def hashes_of(tokens: Sequence[int], weights: int = 0) -> list[int]:
    values, value = [], weights
    for token in tokens:
        value = chain(value, token)
        values.append(value)
    return values


class DawdlingCopier:
    """In place of the thread: copies get on by a random number of blocks now and then, and to
    their end only where the orders say that the forward waits."""

    def __init__(self, copies: CheckedCopies, chance: random.Random, pace: int = 3) -> None:
        self.copies, self.queue, self._chance, self._pace = copies, copies.queue, chance, pace
        self.num_waits = 0

    def begin_step(self, orders: Orders) -> None:
        self.queue.take(orders)
        self._dawdle()
        while not self.queue.is_over(orders.wait):
            self.num_waits += 1
            self.copies.advance()

    def report(self) -> Report | None:
        self._dawdle()
        return self.queue.take_report()

    def finish(self) -> None:
        """All that is queued still."""
        while self.queue.has_work():
            self.copies.advance()

    def settle(self) -> None:
        self.finish()

    def close(self) -> None:
        """Nothing runs on its own."""

    def _dawdle(self) -> None:
        for _ in range(self._chance.randrange(self._pace + 1)):
            self.copies.advance()
