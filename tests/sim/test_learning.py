"""What a server learns while it serves does not turn against its offline work."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from conserve.core.latency import LatencyModel, StepShape
from conserve.metrics import throughput
from conserve.sim.cost import profiled_model
from conserve.sim.engine import Engine
from conserve.sim.request import SimRequest
from conserve.sim.schedulers import ConserveScheduler
from tests.sim.sim_world import COST, MACHINE, TARGETS

END_S = 150.0


@dataclass(frozen=True)
class Alike:
    """Every step takes as long, as where something else than its tokens bounds it."""

    def predict_s(self, shape: StepShape) -> float:
        return 0.02 if shape.num_tokens else 0.0


def request(name: str, index: int, *, online: bool, arrival_s: float) -> SimRequest:
    lengths = (50 + 71 * index % 800, 5 + 13 * index % 60) if online else (700, 40)
    return SimRequest.arriving(
        f"{name}-{index}",
        online=online,
        arrival_s=arrival_s,
        num_prompt_tokens=lengths[0],
        num_output_tokens=lengths[1],
    )


def harvest_tps(profile: LatencyModel) -> float:
    """Offline tokens a second in the second half, of a server that begins with this profile."""
    offline: list[SimRequest] = []

    def next_one(now_s: float) -> list[SimRequest]:
        offline.append(request("offline", len(offline), online=False, arrival_s=now_s))
        return offline[-1:]

    def finished(ended: SimRequest, now_s: float) -> Iterable[SimRequest]:
        return () if ended.online else next_one(now_s)

    engine = Engine(MACHINE, Alike(), ConserveScheduler(profile, TARGETS), on_finish=finished)
    for _ in range(20):
        engine.submit(next_one(0.0)[0])
    for index in range(int(2 * END_S)):
        engine.submit(request("online", index, online=True, arrival_s=0.5 * index))
    engine.run(END_S)
    got = throughput([one.record() for one in offline], END_S / 2, END_S)
    return got.prompt_tps + got.output_tps


def test_a_profile_of_another_machine_costs_no_harvest_for_good() -> None:
    right = harvest_tps(profiled_model(Alike(), MACHINE.max_step_tokens))
    assert harvest_tps(COST) > 0.9 * right > 1000
