"""Negative controls: engines that are careless in one point break the clause about it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from conserve.core.policy import decide
from conserve.core.snapshot import Capacity, RequestView, Snapshot, Targets
from conserve.core.stopping import RunningStep, stop_at_s
from conserve.engine.promises import OwnTargets
from conserve.metrics.first_tokens import EndedStep
from conserve.sim.state import EngineState
from conserve.sim.step import Step
from tests.contract import clauses
from tests.contract.clauses import Clause
from tests.contract.situation import Play
from tests.contract.whole_prompts import prompts_that_cannot_be_cut_come_whole

Careless = Callable[..., Any]


def online_when_it_suits(snapshot: Snapshot, *others: Any) -> Any:
    """Waiting online requests are seen only by an engine without offline work."""
    if any(not view.online for view in snapshot.running):
        snapshot = replace(snapshot, waiting_online=())
    return decide(snapshot, *others)


def greedy_in_the_slack(snapshot: Snapshot, *others: Any) -> Any:
    """Online tokens may come five times as late as promised."""
    targets = Targets(snapshot.targets.ttft_s, 5 * snapshot.targets.tbt_s)
    return decide(replace(snapshot, targets=targets), *others)


def in_chunks(snapshot: Snapshot, *others: Any) -> Any:
    """Cuts prompts whether they may be cut or not."""
    return decide(replace(snapshot, whole_prompts=False), *others)


def blind_to_adapters(snapshot: Snapshot, *others: Any) -> Any:
    """A step may hold requests of any number of them."""
    return decide(replace(snapshot, capacity=Capacity()), *others)


def deaf_to_own_targets(snapshot: Snapshot, *others: Any) -> Any:
    """Knows the server's targets alone."""
    running = [replace(view, tbt_target_s=None) for view in snapshot.running]
    return decide(replace(snapshot, running=running), *others)


def one_target_for_all(targets: Targets, _: RequestView) -> float:
    return targets.ttft_s


def names_none(*_: Any) -> OwnTargets:
    return OwnTargets()


def by_arrival(request: Any, *_: Any) -> tuple[float, float, str]:
    return (request.priority, request.arrival_time, request.request_id)


def arrival_alone(_: Targets, request: RequestView) -> float:
    return request.arrival_s


def the_dearest_first(candidates: Sequence[RequestView], *needs: int) -> list[RequestView]:
    """Of the victims, those that lose most."""
    return sorted(candidates, key=lambda view: -view.num_computed_tokens)[:1]


def everybody(candidates: Sequence[RequestView], *needs: int) -> list[RequestView]:
    """Displaces all offline requests, and even for nobody's sake."""
    return list(candidates)


def at_every_arrival(*_: Any, now_s: float, **__: Any) -> float:
    return now_s


def whoever_is_due(step: RunningStep, *others: Any, **given: Any) -> float:
    """Stops although online tokens come late for it."""
    return stop_at_s(replace(step, due_s=float("inf")), *others, **given)


def never_again(*given: Any, now_s: float, **others: Any) -> float:
    """What is not stopped for an arrival goes on, however long it takes."""
    stop_s = stop_at_s(*given, now_s=now_s, **others)
    return stop_s if stop_s <= now_s else math.inf


def never_asked(*given: Any) -> EndedStep:
    """Takes the time of a stop for one of waiting."""
    return EndedStep(*given[:5])


def nothing(*_: Any, **__: Any) -> list[str]:
    return []


def youngest_first(request: Any, wait_s: float) -> tuple[float, float, str]:
    return (request.priority, -request.arrival_time, request.request_id)


def forget_the_stop(state: EngineState, step: Step) -> None:
    """The livelock rule never learns of a stop."""
    DROP(state, step)
    for name in step.grants:
        state.places.live[name].num_stops = 0


def forget_to_undo(state: EngineState, step: Step) -> None:
    """Takes the stopped step for done."""
    state.counters.num_stopped_steps += 1
    state.complete(step, step.end_s)


DROP = EngineState.drop
ENGINE, SIM, POLICY = "conserve.engine", "conserve.sim", "conserve.core.policy"
TARGETS = "conserve.core.snapshot:Targets"

CASES: tuple[tuple[str, str, Careless, Clause], ...] = (
    ("engine", f"{ENGINE}.driver:decide", online_when_it_suits, clauses.online_comes_first),
    ("sim", f"{SIM}.schedulers:decide", online_when_it_suits, clauses.online_comes_first),
    ("engine", f"{ENGINE}.driver:decide", greedy_in_the_slack,
     clauses.offline_tokens_keep_the_tbt_target),
    ("sim", f"{SIM}.schedulers:decide", greedy_in_the_slack,
     clauses.offline_tokens_keep_the_tbt_target),
    ("engine", f"{ENGINE}.driver:decide", in_chunks,
     prompts_that_cannot_be_cut_come_whole),
    ("sim", f"{SIM}.schedulers:decide", in_chunks, prompts_that_cannot_be_cut_come_whole),
    ("engine", f"{ENGINE}.driver:decide", blind_to_adapters,
     clauses.adapters_are_no_reason_to_wait_behind_offline_work),
    ("sim", f"{SIM}.schedulers:decide", blind_to_adapters,
     clauses.adapters_are_no_reason_to_wait_behind_offline_work),
    ("engine", f"{ENGINE}.driver:decide", deaf_to_own_targets,
     clauses.a_requests_own_tbt_target_is_kept),
    ("sim", f"{SIM}.schedulers:decide", deaf_to_own_targets,
     clauses.a_requests_own_tbt_target_is_kept),
    ("engine", f"{ENGINE}.promises:Promises.own_targets", names_none,
     clauses.a_requests_own_tbt_target_is_kept),
    ("engine", f"{ENGINE}.promises:Promises.own_targets", names_none,
     clauses.a_step_waits_for_nobody_who_is_due_sooner),
    ("sim", f"{TARGETS}.ttft_of", one_target_for_all,
     clauses.a_step_waits_for_nobody_who_is_due_sooner),
    ("engine", f"{ENGINE}.queue:_place", by_arrival, clauses.those_due_sooner_come_first),
    ("sim", f"{TARGETS}.first_due_s", arrival_alone, clauses.those_due_sooner_come_first),
    ("engine", f"{POLICY}:choose_victims", the_dearest_first, clauses.the_cheapest_makes_room),
    ("sim", f"{POLICY}:choose_victims", the_dearest_first, clauses.the_cheapest_makes_room),
    ("engine", f"{POLICY}:choose_victims", everybody, clauses.the_cheapest_makes_room),
    ("sim", f"{POLICY}:choose_victims", everybody, clauses.the_cheapest_makes_room),
    ("engine", f"{ENGINE}.monitor:stop_at_s", at_every_arrival, clauses.stops_only_if_needed),
    ("sim", f"{SIM}.schedulers:stop_at_s", at_every_arrival, clauses.stops_only_if_needed),
    ("engine", f"{ENGINE}.monitor:stop_at_s", never_again,
     clauses.a_step_that_outruns_its_prediction_is_judged_again),
    ("sim", f"{SIM}.schedulers:stop_at_s", never_again,
     clauses.a_step_that_outruns_its_prediction_is_judged_again),
    ("engine", f"{ENGINE}.monitor:stop_at_s", at_every_arrival,
     clauses.a_step_that_outruns_its_prediction_is_judged_again),
    ("sim", f"{SIM}.schedulers:stop_at_s", at_every_arrival,
     clauses.a_step_that_outruns_its_prediction_is_judged_again),
    ("engine", f"{ENGINE}.monitor:stop_at_s", whoever_is_due,
     clauses.decodes_are_stopped_while_their_tokens_can_be_in_time),
    ("sim", f"{SIM}.schedulers:stop_at_s", whoever_is_due,
     clauses.decodes_are_stopped_while_their_tokens_can_be_in_time),
    ("engine", f"{ENGINE}.stopper:roll_back", nothing, clauses.a_stopped_step_leaves_no_trace),
    ("sim", f"{SIM}.state:EngineState.drop", forget_to_undo,
     clauses.a_stopped_step_leaves_no_trace),
    ("engine", f"{ENGINE}.tracker:RequestTracker.stopped", nothing, clauses.stops_wear_off),
    ("sim", f"{SIM}.state:EngineState.drop", forget_the_stop, clauses.stops_wear_off),
    ("engine", f"{ENGINE}.first_tokens:EndedStep", never_asked,
     clauses.first_tokens_are_taken_apart),
    ("sim", f"{SIM}.engine:EndedStep", never_asked, clauses.first_tokens_are_taken_apart),
    ("engine", f"{ENGINE}.tracker:RequestTracker.computed", nothing, clauses.everything_adds_up),
    ("engine", f"{ENGINE}.queue:_place", youngest_first,
     clauses.first_come_first_served_within_a_class),
)  # fmt: skip


@pytest.mark.parametrize(
    ("play", "place", "careless", "clause"),
    [
        pytest.param(*case, marks=[pytest.mark.engine] if case[0] == "engine" else [])
        for case in CASES
    ],
    indirect=["play"],
    ids=[f"{kind}-{careless.__name__}-{clause.__name__}" for kind, _, careless, clause in CASES],
)
def test_carelessness_is_caught(
    play: Play, place: str, careless: Careless, clause: Clause, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, name = place.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, last = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    monkeypatch.setattr(owner, last, careless)
    with pytest.raises((AssertionError, IndexError, KeyError)):
        clause(play)
