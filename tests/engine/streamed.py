"""The real scheduler and the real copies of a device with streams, on one that dawdles.

Every layer of every block has its KV in real tensors: the hash of all tokens up to each position.
Forwards are queued layer by layer on the compute stream, and read what the host prepared for them
only when their turn comes, from as many buffers as there may be steps in flight: a step whose
output resolves before the device is done lets the host overwrite what is still to be read.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from conserve.engine.checkpoint.copy_queue import CopyQueue
from conserve.engine.checkpoint.disk import SlotFile
from conserve.engine.checkpoint.orders import Orders, Report
from conserve.engine.checkpoint.rows import BlockRows
from conserve.engine.checkpoint.slots import HostSlots
from conserve.engine.checkpoint.staging import staging_buffers
from conserve.engine.checkpoint.streams import StreamCopies
from conserve.engine.step_times import StepTimes, TimedOutput
from conserve.engine.stopped import StoppedOutput
from tests.engine.device import Row, StaleReadError, sample
from tests.engine.engine import BLOCK_SIZE, IDLE_S, Engine
from tests.engine.stream_device import StandInDevice, StandInEvent

NUM_LAYERS = 3
MakeFile = Callable[[int], SlotFile]
"""Bytes of a slot -> the tier on disk."""


@dataclass
class Span:
    """Tokens [start, end) of a request, and where its KV lies as the host knows it."""

    row: Row
    blocks: list[int]
    start: int
    end: int
    is_last: bool
    """The forward yields the next token."""


@dataclass
class InFlight:
    """A step that is queued. What it yields is there once the device has passed `done`."""

    names: list[str]
    stop_at: int | None
    connector_output: Any
    done: StandInEvent
    sampled: list[list[int]] = field(default_factory=list)


@dataclass
class StandInMark:
    """`step_times.Mark`, on a device without a clock."""

    event: StandInEvent

    def wait(self) -> None:
        self.event.synchronize()

    def passed_s(self) -> float:
        return 0.0


@dataclass
class PumpedByHand:
    """In place of the copier's thread."""

    copies: StreamCopies
    streams: StandInDevice

    def begin_step(self, orders: Orders) -> None:
        self.copies.begin_step(orders)

    def report(self) -> Report | None:
        return self.copies.report()

    def finish(self) -> None:
        """All that is queued still, of copies and forwards; the last pump finds what the streams
        have ended, whose checksums may be due."""
        while self.copies.pump() or self.copies.has_work() or self._any_queued():
            self.streams.dawdle(5)

    def _any_queued(self) -> bool:
        return any(stream.queue for stream in self.streams.streams)

    def settle(self) -> None:
        self.copies.settle()

    def close(self) -> None:
        self.copies.close()


class StreamedDevice:
    """A worker's host side and its device."""

    def __init__(self, num_blocks: int, depth: int, chance: random.Random) -> None:
        self.kv = torch.zeros((NUM_LAYERS, num_blocks, 1, BLOCK_SIZE, 1), dtype=torch.int64)
        self.streams = StandInDevice(chance)
        self.connector: Any = None
        self.copies: Any = None
        self._chance = chance
        self._rows: dict[str, Row] = {}
        self._inputs: list[list[Span]] = [[] for _ in range(depth)]
        self._num_steps = 0

    def give_copies(
        self,
        connector: Any,
        num_slots: int,
        make_file: MakeFile | None,
        *,
        checksums: bool = False,
    ) -> None:
        rows = BlockRows(list(self.kv))
        memory = torch.full((num_slots * rows.slot_bytes,), 85, dtype=torch.int8)
        file = make_file and make_file(rows.slot_bytes)
        slots = HostSlots(memory, rows.slot_bytes, file, checksums=checksums)
        queue, staging = CopyQueue(rows.slot_bytes), staging_buffers(self.streams, rows.slot_bytes)
        self.copies = StreamCopies(queue, rows, slots, self.streams, staging)
        self.connector = connector
        connector.worker_side.copies.copier = PumpedByHand(self.copies, self.streams)

    # The host

    def dispatch(self, output: Any, stop_at: int | None) -> InFlight:
        """Queue a step's forward, or the layers of it before the one that it is stopped at."""
        self._others_get_on()
        self._update(output)
        names = list(output.num_scheduled_tokens)
        inputs = self._inputs[self._num_steps % len(self._inputs)]
        inputs[:] = self._spans(output)
        self._num_steps += 1
        self.connector.handle_preemptions(output.kv_connector_metadata)
        self._others_get_on()
        flight = InFlight(names, stop_at, None, self.streams.compute.record())
        self._forward(inputs, flight)
        flight.done = self.streams.compute.record()
        self._others_get_on()
        flight.connector_output = self._reported()
        return flight

    def resolve(self, flight: InFlight) -> Any:
        """The step's output, when the device is done with it."""
        from vllm.v1.outputs import ModelRunnerOutput

        if flight.stop_at is not None:
            stopped = StoppedOutput.of(flight.names, flight.stop_at, flight.connector_output)
            return TimedOutput(stopped, 0.0, StandInMark(flight.done)).get_output()
        flight.done.synchronize()
        return ModelRunnerOutput(
            req_ids=flight.names,
            req_id_to_index={name: i for i, name in enumerate(flight.names)},
            sampled_token_ids=flight.sampled,
            kv_connector_output=flight.connector_output,
        )

    def _others_get_on(self) -> None:
        """The thread that pumps, and the device."""
        for _ in range(self._chance.randrange(3)):
            if self.connector.worker_side.copies.copier:
                self.copies.pump()
            self.streams.dawdle(4)

    def _reported(self) -> Any:
        from vllm.v1.outputs import KVConnectorOutput

        report = self.connector.build_connector_worker_meta()
        return KVConnectorOutput(kv_connector_worker_meta=report)

    def _update(self, output: Any) -> None:
        """What a model runner does with a scheduler output. Rows that a queued forward has are
        never changed but at their ends: a request that comes back gets a new one."""
        for name in output.finished_req_ids:
            self._rows.pop(name, None)
        for new in output.scheduled_new_reqs:
            self._rows[new.req_id] = Row(list(new.prompt_token_ids), [list(new.block_ids[0])])
        cached = output.scheduled_cached_reqs
        for name, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if name in cached.resumed_req_ids:
                tokens = cached.all_token_ids.get(name) or self._rows[name].tokens
                self._rows[name] = Row(list(tokens), [list(blocks[0])])
            elif blocks is not None:
                self._rows[name].blocks[0].extend(blocks[0])

    def _spans(self, output: Any) -> list[Span]:
        cached = output.scheduled_cached_reqs
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        starts |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        spans = []
        for name, count in output.num_scheduled_tokens.items():
            row, end = self._rows[name], starts[name] + count
            spans.append(Span(row, list(row.blocks[0]), starts[name], end, False))
        return spans

    # The device

    def _forward(self, inputs: list[Span], flight: InFlight) -> None:
        compute = self.streams.compute
        for layer in range(NUM_LAYERS if flight.stop_at is None else flight.stop_at):
            compute.submit(self._layer(layer, inputs))
        if flight.stop_at is None:
            compute.submit(lambda: flight.sampled.extend(map(_next_token, inputs)))

    def _layer(self, layer: int, inputs: list[Span]) -> Callable[[], None]:
        def run() -> None:
            for span in inputs:
                for position in range(span.start):
                    block, at = span.blocks[position // BLOCK_SIZE], position % BLOCK_SIZE
                    if int(self.kv[layer, block, 0, at, 0]) != span.row.hash_at(position):
                        raise StaleReadError(f"layer {layer} reads block {block} at {position}")
                for position in range(span.start, span.end):
                    block, at = span.blocks[position // BLOCK_SIZE], position % BLOCK_SIZE
                    self.kv[layer, block, 0, at, 0] = span.row.hash_at(position)

        return run


def _next_token(span: Span) -> list[int]:
    row = span.row
    if span.end < len(row.tokens):
        return []
    row.tokens.append(sample(row.hash_at(span.end - 1)))
    return [row.tokens[-1]]


class AheadEngine(Engine):
    """vLLM's step loops as they are over a device that works by itself: a step is queued when it
    is scheduled, up to `depth` of them, and its output read when it is the oldest."""

    def step(self) -> bool:
        scheduler, queue = self.scheduler, self._queue
        if len(queue) < self.depth and scheduler.has_requests():
            output = scheduler.schedule()
            record = list(scheduler.driver.steps)[-1]
            stops = bool(record.plan.stoppable and self.stop and self.stop(record.number))
            stops = stops and bool(output.total_num_scheduled_tokens)
            self.num_stops += stops
            flight = self.device.dispatch(output, self.stop_layer() if stops else None)
            queue.append((output, flight))
            goes_on = output.total_num_scheduled_tokens or scheduler.has_requests()
            if len(queue) < self.depth and goes_on:
                return True
        if not queue:
            return False
        output, flight = queue.popleft()
        self._deliver(output, self.device.resolve(flight))
        return bool(output.total_num_scheduled_tokens)

    def _deliver(self, output: Any, result: Any) -> None:
        clock, launched_s = self.scheduler.clock, self.scheduler.clock.now_s
        clock.now_s += self.step_s if output.total_num_scheduled_tokens else IDLE_S
        result.step_times = StepTimes(launched_s, clock.now_s)
        for client in self.scheduler.update_from_output(output, result).values():
            for one in client.outputs:
                self.outputs[one.request_id].extend(one.new_token_ids)
                if one.finish_reason is not None:
                    self.finished.add(one.request_id)
