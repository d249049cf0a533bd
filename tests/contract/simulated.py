"""A situation on the simulator."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

from conserve.core.latency import StepShape
from conserve.sim.cost import Machine
from conserve.sim.engine import Engine
from conserve.sim.request import SimRequest
from conserve.sim.schedulers import ConserveScheduler
from conserve.sim.step import Step
from conserve.sim.text import Text
from tests.contract.situation import (
    BLOCK_SIZE,
    COST,
    NUM_LAYERS,
    SAFEPOINT_LAYERS,
    TOKEN_BYTES,
    Ask,
    Seen,
    SeenStep,
    World,
    in_order,
    watched,
)


@dataclass(frozen=True, eq=False)
class Truth:
    """What steps take in a world."""

    world: World

    def predict_s(self, shape: StepShape) -> float:
        return self.world.step_s(shape)


def play(world: World, asks: Sequence[Ask]) -> Seen:
    seen = Seen(world, {ask.name: ask for ask in asks})
    scheduler = ConserveScheduler(COST, world.targets, world.policy)
    machine = Machine(
        num_blocks=world.num_blocks,
        block_size=BLOCK_SIZE,
        max_running=world.max_running,
        max_step_tokens=world.max_step_tokens,
        chunked_prefill=world.chunked_prefill,
        max_adapters=world.max_adapters,
        num_layers=NUM_LAYERS,
        safepoint_layers=SAFEPOINT_LAYERS,
        kv_bytes_per_token=TOKEN_BYTES,
        link_bytes_per_s=world.link_tokens_per_s * TOKEN_BYTES,
    )

    def on_step(step: Step) -> None:
        one = SeenStep(step.start_s, step.end_s, dict(step.grants), step.stoppable, step.stopped)
        seen.steps.append(one)

    engine = Engine(
        machine, Truth(world), scheduler, async_scheduling=world.async_scheduling, on_step=on_step
    )
    scheduler.planner = watched(scheduler.planner, seen, engine.places.pool.order)
    requests = [
        SimRequest.arriving(
            ask.name,
            online=ask.online,
            arrival_s=ask.arrival_s,
            num_prompt_tokens=ask.num_prompt_tokens,
            num_output_tokens=ask.num_output_tokens,
            adapter=ask.adapter,
            ttft_target_s=ask.ttft_target_s,
            tbt_target_s=ask.tbt_target_s,
            text=Text(ask.session or ask.name, ask.prefix, shared=bool(ask.session)),
        )
        for ask in in_order(asks)
    ]
    for request in requests:
        engine.submit(request)
    engine.run()
    seen.token_times_s = {r.request_id: r.token_times_s for r in requests}
    seen.cached_tokens = {r.request_id: r.num_cached_tokens or 0 for r in requests}
    seen.num_free_blocks = engine.places.pool.num_free_blocks
    for parts in engine.first_token_parts:
        for part, seconds in parts.items():
            insort(seen.waits.setdefault(str(part), []), seconds)
    counters = engine.counters
    seen.computed_tokens = counters.computed_tokens - counters.dropped_tokens
    seen.recomputed_tokens = counters.recomputed_tokens
    seen.dropped_tokens = counters.dropped_tokens
    return seen
