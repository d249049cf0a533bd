"""A situation on vLLM's scheduler under our policy, on the pretend device and a virtual clock."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from conserve.core.calibration import Recalibrator
from conserve.engine.promises import TBT_ARG, TTFT_ARG
from conserve.engine.settings import EngineSettings
from conserve.engine.step_times import StepTimes
from conserve.engine.steps import StepRecord
from tests.contract.situation import (
    BLOCK_SIZE,
    COST,
    NUM_LAYERS,
    SAFEPOINT_LAYERS,
    Ask,
    Seen,
    SeenStep,
    World,
    does_something,
    in_order,
    watched,
)
from tests.contract.timed_copies import TimedCopier, give_link
from tests.engine.device import VOCABULARY, Device, expected_output
from tests.engine.engine import Engine, InFlight, make_request, make_scheduler

MOST_TURNS = 20_000


def play(folder: Path, world: World, asks: Sequence[Ask]) -> Seen:
    """Raises AssertionError where the device sees a wrong read, or a request its wrong tokens."""
    settings = EngineSettings(
        slo_ttft_s=world.targets.ttft_s,
        slo_tbt_s=world.targets.tbt_s,
        offline_floor=world.targets.offline_floor,
        profile_seconds=0,
        stop_response_s=1e3,
        checkpoint_bytes=1 << 24,
        checkpoint_online=False,  # not simulated
        policy=world.policy,
    )
    scheduler = make_scheduler(
        folder,
        # One is vLLM's null block.
        num_blocks=world.num_blocks + 1,
        max_num_seqs=world.max_running,
        max_step_tokens=world.max_step_tokens,
        async_scheduling=world.async_scheduling,
        chunked_prefill=world.chunked_prefill,
        settings=settings,
        max_adapters=world.max_adapters,
    )
    scheduler.clock.now_s = 0.0
    scheduler.experience.recalibrator = Recalibrator(COST, mean_error=COST.margin / 2)
    seen = Seen(world, {ask.name: ask for ask in asks})
    try:
        device = Device(BLOCK_SIZE)
        engine = TimedEngine(scheduler, device, depth=1 + world.async_scheduling, seen=seen)
        if world.link_tokens_per_s:
            engine.copier = give_link(scheduler, device, world.link_tokens_per_s)
        engine.play(asks)
    finally:
        scheduler.shutdown()
    return seen


@dataclass
class TimedEngine(Engine):
    """The step loops of the engine's tests, where a step takes as long as `COST` says, and
    arrivals come while it runs, as from vLLM's input thread."""

    seen: Seen = None  # type: ignore[assignment]
    copier: TimedCopier | None = None

    def play(self, asks: Sequence[Ask]) -> None:
        self._watch()
        self._coming = deque(in_order(asks))
        clock = self.scheduler.clock
        for _ in range(MOST_TURNS):
            self._take_arrivals()
            if self.scheduler.has_requests() or self._queue:
                self._idle = False
                self.step_fn()
                if self._idle and not any(
                    one.output.total_num_scheduled_tokens for one in self._queue
                ):
                    self._pass_time()
            elif self._coming:
                clock.now_s = self._coming[0].arrival_s
            else:
                return self._close()
        raise AssertionError(f"{self.scheduler.get_num_unfinished_requests()} requests remain")

    def _some_tokens_in_flight(self) -> bool:
        return any(flight.output.total_num_scheduled_tokens for flight in self._queue)

    def _pass_time(self) -> None:
        """Where all that is left to do waits for a load, until that is over or somebody comes."""
        next_s = self.copier.next_load_s if self.copier else None
        if next_s is None:
            return
        if self._coming:
            next_s = min(next_s, self._coming[0].arrival_s)
        clock = self.scheduler.clock
        clock.now_s = max(clock.now_s, next_s)
        # An engine that polls learns of it in that moment.
        self.scheduler.connector.update_connector_output(self.device._reported())

    def _watch(self) -> None:
        self._counts = dict[str, float]()
        driver = self.scheduler.driver
        (queue,) = self.scheduler.retention.queues
        driver.planner = watched(driver.planner, self.seen, queue.order)
        connector = self.scheduler.connector
        self._hand_over = connector.get_kv_connector_stats
        connector.get_kv_connector_stats = self._keep_counts

    def _keep_counts(self) -> Any:
        stats = self._hand_over()
        for name, label, value in stats.items() if stats else ():
            if name == "first_token_part_seconds":
                self.seen.waits[label] = sorted([*self.seen.waits.get(label, ()), *value])
            if isinstance(value, float | int):
                self._counts[name] = self._counts.get(name, 0.0) + value
        return stats

    def _take_arrivals(self) -> None:
        now_s = self.scheduler.clock()
        while self._coming and self._coming[0].arrival_s <= now_s:
            ask = self._coming.popleft()
            self.add(_request(ask))

    def _dispatch(self, output: Any, record: StepRecord) -> StepTimes:
        """The workers are processes of their own, and the engine goes on beside them."""
        return StepTimes(self.scheduler.clock(), math.nan)

    def _finish(self, flight: InFlight) -> None:
        output, record, _ = flight
        clock = self.scheduler.clock
        start_s = clock()
        grants = dict(output.num_scheduled_tokens)
        begin_s = start_s + self._begin_copies(output)
        end_s, layers = self._run(record, begin_s) if grants else (begin_s, None)
        self._idle = not grants and not does_something(record.plan)
        clock.now_s = end_s
        result = self.device.run(output, stop_at=layers)
        result.step_times = StepTimes(start_s, end_s)
        for client in self.scheduler.update_from_output(output, result).values():
            for one in client.outputs:
                self.outputs[one.request_id].extend(one.new_token_ids)
                if one.prefill_stats is not None:
                    cached = one.prefill_stats.num_cached_tokens
                    self.seen.cached_tokens.setdefault(one.request_id, cached)
                times = self.seen.token_times_s.setdefault(one.request_id, [])
                times += [end_s] * len(one.new_token_ids)
        if grants:
            self.seen.steps.append(
                SeenStep(start_s, end_s, grants, record.plan.stoppable, layers is not None)
            )

    def _begin_copies(self, output: Any) -> float:
        """Begin the step's copies; returns how long its forward waits for some of them."""
        if self.copier is None:
            return 0.0
        self.device.connector.handle_preemptions(output.kv_connector_metadata)
        waited_s = self.copier.waited_s
        # The device hands the same orders over again.
        output.kv_connector_metadata.orders.__init__()
        return waited_s

    def _run(self, record: StepRecord, start_s: float) -> tuple[float, int | None]:
        """When the step ends, and after how many layers if it is stopped."""
        clock, scheduler = self.scheduler.clock, self.scheduler
        if record.plan.stoppable and scheduler.stopper.flag.is_raised_for(record.number):
            # While the step before it ran: it looks before its first layer.
            return start_s, 0
        seconds = self.seen.world.step_s(record.shape)
        end_s, layers = start_s + seconds, None
        layer_s = seconds / NUM_LAYERS
        coming = deque(ask for ask in self._coming if ask.online)
        while (now_s := self._next_word_s(coming)) < end_s:
            clock.now_s = now_s
            if coming and coming[0].arrival_s == now_s:
                ask = coming.popleft()
                ttft_s = scheduler.promises.own_targets(_request(ask)).ttft_s
                scheduler.monitor.arrived(ask.name, ask.arrival_s, ask.num_prompt_tokens, ttft_s)
            else:
                scheduler.monitor.alarm.ring()
            if layers is None and scheduler.stopper.flag.is_raised_for(record.number):
                looks = math.ceil((now_s - start_s) / (layer_s * SAFEPOINT_LAYERS) - 1e-9)
                looks = max(0, looks)
                stop_s = max(now_s, start_s + looks * SAFEPOINT_LAYERS * layer_s)
                if stop_s < end_s:
                    end_s, layers = stop_s, looks * SAFEPOINT_LAYERS
        return end_s, layers

    def _next_word_s(self, coming: deque[Ask]) -> float:
        """When the monitor hears of somebody next, or looks again by itself."""
        arrival_s = coming[0].arrival_s if coming else math.inf
        return min(arrival_s, float(self.scheduler.monitor.alarm.at_s))

    def _close(self) -> None:
        for ask in self.seen.asks.values():
            wanted = expected_output(prompt_of(ask), ask.num_output_tokens)
            assert self.outputs[ask.name] == wanted, f"P4: {ask.name}"
        pool = self.scheduler.kv_cache_manager.block_pool
        self.seen.num_free_blocks = pool.get_num_free_blocks()
        self._keep_counts()
        for name in ("computed_tokens", "recomputed_tokens", "dropped_tokens"):
            setattr(self.seen, name, int(self._counts.get(name, 0)))


def _request(ask: Ask) -> Any:
    """As vLLM's engine process receives it."""
    named = {TTFT_ARG: ask.ttft_target_s, TBT_ARG: ask.tbt_target_s}
    return make_request(
        ask.name,
        prompt_of(ask),
        ask.num_output_tokens,
        online=ask.online,
        arrival_s=ask.arrival_s,
        adapter=ask.adapter,
        extra_args={name: seconds for name, seconds in named.items() if seconds is not None},
    )


def prompt_of(ask: Ask) -> list[int]:
    """What was said before, or the texts that it begins with, and its own: else no two requests
    share a prefix."""
    if ask.after:
        before = prompt_of(ask.after)
        begin = before + expected_output(before, ask.after.num_output_tokens)
    else:
        begin = [token for name, count in ask.prefix for token in _words(name, count)]
    return begin + _words(ask.name, ask.num_prompt_tokens - len(begin))


def _words(name: str, count: int) -> list[int]:
    chance = Random(name)
    return [chance.randrange(1, VOCABULARY) for _ in range(count)]
