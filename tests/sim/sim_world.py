"""Small machines, seeded workloads, and an oracle that looks at an engine from outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from conserve.core.blocks import blocks_for
from conserve.core.invariants import check
from conserve.core.latency import LatencyModel
from conserve.core.plan import Plan
from conserve.core.snapshot import Targets
from conserve.sim.arms import ARMS
from conserve.sim.cost import Machine
from conserve.sim.engine import Engine
from conserve.sim.places import Places
from conserve.sim.profiles import Profile
from conserve.sim.request import Phase, SimRequest
from conserve.sim.run import Outcome, simulate
from conserve.sim.schedulers import ConserveScheduler
from conserve.sim.step import Step
from conserve.workload import RequestPlan, Window, Workload

COST = LatencyModel(0.004, 4e-5, 1e-9, 1e-5, 1e-7, knee=64, margin=0.02)
MACHINE = Machine(
    num_blocks=400,
    max_running=24,
    max_step_tokens=1024,
    num_layers=16,
    kv_bytes_per_token=1000,
    safepoint_s=1e-5,
)
SMALL = replace(MACHINE, num_blocks=150, max_running=12)
"""So small that requests are displaced and preempted all the time."""
TARGETS = Targets(ttft_s=0.5, tbt_s=0.05)
WINDOW = Window(lead_in_s=2.0, duration_s=20.0, drain_s=60.0)


def workload(seed: int, *, rate_rps: float = 3.0, in_flight: int = 20) -> Workload:
    rng, now_s = Random(seed), 0.0
    online: list[RequestPlan] = []
    while (now_s := now_s + rng.expovariate(rate_rps)) < WINDOW.duration_s:
        lengths = rng.randint(8, 900), rng.randint(1, 40)
        online.append(RequestPlan(f"online-{len(online)}", True, now_s, *lengths))
    offline = [
        RequestPlan(f"offline-{i}", False, -2.0, rng.randint(100, 1500), rng.randint(1, 90))
        for i in range(600)
    ]
    return Workload(online, offline, in_flight)


def run(
    seed: int = 1,
    arm: str = "conserve",
    *,
    targets: Targets = TARGETS,
    work: Workload | None = None,
    async_scheduling: bool = False,
    on_step: Callable[[Step], None] | None = None,
    **fields: float,
) -> Outcome:
    """`workload(seed)` under an arm, on MACHINE with some fields changed."""
    profile = Profile("test", "made up", replace(MACHINE, **fields), COST)  # type: ignore[arg-type]
    return simulate(
        work or workload(seed),
        ARMS[arm],
        profile,
        targets,
        WINDOW,
        seed=seed,
        async_scheduling=async_scheduling,
        on_step=on_step,
    )


class CheckedScheduler(ConserveScheduler):
    """The policy, with core's own invariants and the oracle after every decision."""

    num_plans = 0

    def plan(self, places: Places, now_s: float) -> Plan:
        audit(places)
        plan = super().plan(places, now_s)
        check(self.snapshot(places, now_s), plan, self.model, self.settings)
        self.num_plans += 1
        return plan


def audit(at: Places) -> None:
    """Blocks have one owner each, and every request is in the one place its phase says."""
    pool, size = at.pool, at.machine.block_size
    assert pool.num_held_blocks + pool.num_free_blocks == pool.num_blocks
    assert len(at.running) <= at.machine.max_running
    holders = {r.request_id for r in (*at.running, *at.restoring, *at.holding)}
    assert set(pool.holdings) <= holders
    places = {
        Phase.RUNNING: at.running,
        Phase.RESTORING: at.restoring,
        Phase.WAITING: [*at.holding, *at.waiting_online, *at.waiting_offline],
    }
    assert sum(len(place) for place in places.values()) == len(at.live)
    for request in at.live.values():
        assert request in places[request.phase]
        assert request.num_blocks == pool.holdings.get(request.request_id, 0)
        assert 0 <= request.num_computed_tokens <= request.num_tokens
        known = max(request.num_computed_tokens, request.num_lost_tokens)
        assert 0 <= request.num_landed_tokens <= request.num_copying_tokens <= known
        if request.phase is Phase.RUNNING:
            assert request.num_checkpointed_tokens == request.num_landed_tokens
            assert request.num_blocks >= blocks_for(request.num_computed_tokens, size)
        elif request.phase is Phase.WAITING:
            assert request.num_checkpointed_tokens == request.num_copying_tokens
            assert not request.num_blocks or request in at.holding
    assert at.num_online == sum(r.online for r in at.live.values())


def submit_all(engine: Engine, work: Workload) -> list[SimRequest]:
    """Every request of `work` at its own arrival, without a closed loop."""
    requests = [
        SimRequest.arriving(
            plan.request_id,
            online=plan.online,
            arrival_s=plan.arrival_s,
            num_prompt_tokens=plan.num_prompt_tokens,
            num_output_tokens=plan.num_output_tokens,
        )
        for plan in (*work.online, *work.offline)
    ]
    for request in requests:
        engine.submit(request)
    return requests
