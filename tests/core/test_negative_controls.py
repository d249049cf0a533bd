"""Careless policies, each of which the invariants must catch.

A property that no broken variant violates is a property nobody checks. Every variant here
differs from the policy in one place; the policy itself passes every scene. Those that only a
whole run shows are in test_liveness.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import pytest

from conserve.core import invariants
from conserve.core.invariants import InvariantError
from conserve.core.latency import LatencyModel, StepShape
from conserve.core.plan import Plan
from conserve.core.policy import Policy, decide
from conserve.core.settings import CHAT_SLOWDOWN, PolicySettings
from conserve.core.snapshot import RequestView, Sharing, Snapshot, Targets
from tests.core.careless import (
    CountsSharedAsFreed,
    CutsPrompts,
    DeafToOwnTargets,
    DisplacesEverybody,
    DisplacesForNobody,
    DisplacesOnline,
    ForgetsAlone,
    ForgetsDisplaced,
    ForgetsLeastProgress,
    ForgetsOnlineMinimum,
    GivesPromisedBlocksAway,
    IgnoresTbt,
    LongUnstoppable,
    MoreSlots,
    MoreTokens,
    RestoresAtAnyPrice,
    SkipsAnOnlineDecode,
    StopsFirstTokens,
    StopsForEver,
    StopsFullSlack,
    StretchesFirstTokens,
    TakesChatsMemory,
    YieldsForNobody,
    planner_of,
)

NOW_S = 100.0
MODEL = LatencyModel(fixed=0.01, per_token=1e-3, margin=0.1)


def decoding(name: str, online: bool, ago_s: float = 0.0, stops: int = 0) -> RequestView:
    return RequestView(
        name,
        online,
        NOW_S - 10.0,
        num_tokens=101,
        num_computed_tokens=100,
        num_blocks=7,
        last_token_s=NOW_S - ago_s,
        num_stops=stops,
    )


def prefilling(name: str, online: bool, left: int = 400) -> RequestView:
    return RequestView(
        name, online, NOW_S - 1.0, num_tokens=64 + left, num_computed_tokens=64, num_blocks=4
    )


def waiting(name: str, online: bool, num_tokens: int) -> RequestView:
    return RequestView(name, online, NOW_S - 0.1, num_tokens)


BASE = Snapshot(
    now_s=NOW_S,
    running=(),
    waiting_online=(),
    waiting_offline=(),
    num_free_blocks=100,
    num_free_slots=4,
    block_size=16,
    max_step_tokens=512,
    targets=Targets(ttft_s=1.0, tbt_s=0.2),
)
OFFLINE = tuple(decoding(f"off-{i}", False) for i in range(3))
SCENES = {
    "slack beside decodes": replace(
        BASE, running=(decoding("on", True, 0.05), *OFFLINE, prefilling("chunk", False))
    ),
    "slack beside decodes, and less of one's own": replace(
        BASE,
        running=(
            decoding("on", True, 0.05),
            replace(decoding("hurried", True, 0.05), tbt_target_s=0.1),
            *OFFLINE,
            prefilling("chunk", False),
        ),
    ),
    "an offline decode that has waited for long": replace(
        BASE, running=(decoding("on", True, 0.05), decoding("off", False, 5.0))
    ),
    "no slack beside decodes": replace(
        BASE, running=(decoding("on", True, 5.0), *OFFLINE, prefilling("chunk", False))
    ),
    "first token": replace(
        BASE, running=(*OFFLINE, prefilling("chunk", False), prefilling("on", True, 100))
    ),
    "full of decodes": replace(
        BASE, running=(*OFFLINE, decoding("on-0", True), decoding("on-1", True)), max_step_tokens=3
    ),
    "no block for an arrival": replace(
        BASE,
        running=(*OFFLINE, decoding("old", True)),
        waiting_online=(waiting("new", True, 100),),
        num_free_blocks=0,
    ),
    "an arrival beside requests that share": replace(
        BASE,
        running=OFFLINE,
        waiting_online=(waiting("new", True, 96),),
        num_free_blocks=0,
        sharing=Sharing({view.request_id: 5 for view in OFFLINE}, num_among_offline=5),
    ),
    "no slot for an arrival": replace(
        BASE, running=OFFLINE, waiting_online=(waiting("new", True, 100),), num_free_slots=0
    ),
    "no help for an arrival": replace(
        BASE, running=OFFLINE, waiting_online=(waiting("new", True, 900),), num_free_blocks=0
    ),
    "backlog beside a half-computed prompt": replace(
        BASE,
        running=(prefilling("chunk", False, 200),),
        waiting_offline=(waiting("off", False, 160), waiting("next", False, 160)),
        num_free_blocks=20,
        targets=Targets(ttft_s=10.0),
    ),
    "backlog and one slot": replace(
        BASE,
        waiting_offline=(waiting("off", False, 100), waiting("next", False, 100)),
        num_free_slots=1,
        targets=Targets(ttft_s=10.0),
    ),
    "worn": replace(
        BASE,
        running=(decoding("worn", False, stops=3), prefilling("chunk", False)),
        can_stop=True,
    ),
    "a stop beside a decode": replace(
        BASE, running=(decoding("on", True, 0.05), prefilling("chunk", False)), can_stop=True
    ),
    "a stop beside a prompt": replace(
        BASE, running=(prefilling("on", True), *OFFLINE), can_stop=True
    ),
    "copies and restores": replace(
        BASE,
        running=OFFLINE,
        waiting_offline=(
            replace(waiting("back", False, 161), num_checkpointed_tokens=160),
            replace(
                waiting("held", False, 161),
                num_computed_tokens=160,
                num_checkpointed_tokens=160,
                num_blocks=10,
            ),
        ),
        copy_tokens=200,
        restore_tokens_per_s=1e6,
        targets=Targets(ttft_s=10.0),
    ),
    "copies beside online work": replace(
        BASE, running=(decoding("on", True, 0.05), *OFFLINE), copy_tokens=200
    ),
    "copies of both classes": replace(
        BASE,
        running=(decoding("on", True, 0.05), *OFFLINE),
        copy_tokens=4096,
        copies_online=True,
    ),
    "a conversation on the host": replace(
        BASE,
        waiting_online=(replace(waiting("goes on", True, 900), num_checkpointed_tokens=800),),
        restore_tokens_per_s=1e6,
    ),
    "a conversation on a slow host": replace(
        BASE,
        waiting_online=(replace(waiting("goes on", True, 900), num_checkpointed_tokens=800),),
        restore_tokens_per_s=100.0,
    ),
    "a conversation on its way": replace(BASE, running=OFFLINE, num_loading_online=1),
    "no limit is kept": replace(BASE, running=OFFLINE, targets=Targets(ttft_s=0.01)),
    "idle but for a prompt": replace(
        BASE, waiting_offline=(waiting("off", False, 100),), targets=Targets(ttft_s=0.01)
    ),
    "room for chat": replace(
        BASE,
        running=OFFLINE,
        waiting_offline=(waiting("off", False, 100),),
        num_remembered_blocks=95,
    ),
    "room for chat, and nobody runs": replace(
        BASE,
        waiting_offline=(waiting("off-0", False, 32), waiting("off-1", False, 32)),
        num_remembered_blocks=1000,
    ),
    "prompts that cannot be cut": replace(
        BASE,
        waiting_online=(waiting("on", True, 500), waiting("behind", True, 100)),
        waiting_offline=(waiting("off", False, 100),),
        whole_prompts=True,
    ),
    "an offline prompt that cannot be cut": replace(
        BASE, waiting_offline=(waiting("off", False, 500),), whole_prompts=True
    ),
    "floor": replace(
        BASE,
        running=(decoding("on", True, 5.0), prefilling("chunk", False)),
        targets=Targets(offline_floor=0.5),
    ),
}


LEVELS = {name: PolicySettings(chat_slowdown=times) for name, times in CHAT_SLOWDOWN.items()}
Careless = Callable[[Snapshot, PolicySettings], Plan]


def of(policy: type[Policy]) -> Careless:
    return lambda snapshot, settings: planner_of(policy)(snapshot, MODEL, settings)


def without_margin(snapshot: Snapshot, settings: PolicySettings) -> Plan:
    return decide(snapshot, replace(MODEL, margin=0.0), settings)


def altered(change: Callable[[Plan, Snapshot], Plan]) -> Careless:
    """The policy's plan with one thing wrong in it."""
    return lambda snapshot, settings: change(decide(snapshot, MODEL, settings), snapshot)


def stop_when_due(plan: Plan, snapshot: Snapshot) -> Plan:
    return replace(plan, due_s=plan.due_s + 1.0)


def shift_tokens(plan: Plan, snapshot: Snapshot) -> Plan:
    online, offline = plan.num_online_tokens, plan.num_offline_tokens
    return replace(plan, num_online_tokens=online + 1, num_offline_tokens=offline - 1)


def miscount_floor(plan: Plan, snapshot: Snapshot) -> Plan:
    return replace(plan, num_floor_tokens=plan.num_offline_tokens + 1)


def misshape(plan: Plan, snapshot: Snapshot) -> Plan:
    shape = plan.shape
    wrong = StepShape(shape.num_tokens, shape.attention_pairs + 1e6, shape.num_decodes)
    return replace(plan, shape=wrong)


def mispredict(plan: Plan, snapshot: Snapshot) -> Plan:
    return replace(plan, predicted_s=plan.predicted_s * 0.5)


def grant_stranger(plan: Plan, snapshot: Snapshot) -> Plan:
    return replace(plan, grants={**plan.grants, "stranger": 1})


def grant_too_much(plan: Plan, snapshot: Snapshot) -> Plan:
    return replace(plan, grants={name: tokens + 1000 for name, tokens in plan.grants.items()})


def grant_nothing(plan: Plan, snapshot: Snapshot) -> Plan:
    return replace(plan, grants=dict.fromkeys(plan.grants, 0))


def displace_waiting(plan: Plan, snapshot: Snapshot) -> Plan:
    waiting = (view.request_id for view in snapshot.waiting_online)
    return replace(plan, displace=(*plan.displace, *waiting))


def copy_too_much(plan: Plan, snapshot: Snapshot) -> Plan:
    return replace(plan, checkpoint={name: end + 1 for name, end in plan.checkpoint.items()})


def copy_online(plan: Plan, snapshot: Snapshot) -> Plan:
    online = {view.request_id: 1 for view in snapshot.running if view.online}
    return replace(plan, checkpoint={**plan.checkpoint, **online})


def restore_too_much(plan: Plan, snapshot: Snapshot) -> Plan:
    return replace(plan, restore={name: end + 1 for name, end in plan.restore.items()})


def restore_what_computes(plan: Plan, snapshot: Snapshot) -> Plan:
    computing = {view.request_id: 64 for view in snapshot.running}
    return replace(plan, restore={**plan.restore, **computing})


def copy_online_first(plan: Plan, snapshot: Snapshot) -> Plan:
    if not snapshot.copies_online:
        return plan
    online = {v.request_id: v.num_computed_tokens for v in snapshot.running if v.online}
    return replace(plan, checkpoint=online)


def claim_stoppable(plan: Plan, snapshot: Snapshot) -> Plan:
    return replace(plan, stoppable=bool(plan.grants))


@dataclass
class Control:
    name: str
    planner: Careless
    message: str


CONTROLS = [
    Control("ignores the margin", without_margin, "P5: .* breaks a TBT target"),
    Control("fills beyond the TBT slack", of(IgnoresTbt), "P5: .* breaks a TBT target"),
    Control("deaf to own targets", of(DeafToOwnTargets), "P5: .* breaks a TBT target"),
    Control("forgets what chat would have alone", of(ForgetsAlone), "P5: .* slow chat more"),
    Control("stretches first tokens", of(StretchesFirstTokens), "P5: .* stretch"),
    Control("offline before online", of(SkipsAnOnlineDecode), "P5: on-. yields to offline"),
    Control("long steps that cannot stop", of(LongUnstoppable), "cannot be stopped"),
    Control("stops for ever", of(StopsForEver), "P0: worn was stopped 3 times"),
    Control("stops first tokens", of(StopsFirstTokens), "carries online prompts"),
    Control("stops with the slack filled", of(StopsFullSlack), "P5: .* too little of their slack"),
    Control("stops when a token is due", altered(stop_when_due), "P5: a stop may come"),
    Control("stops where none can stop", altered(claim_stoppable), "cannot stop one"),
    Control("grants to the displaced", of(ForgetsDisplaced), "displaced and granted"),
    Control("displaces everybody", of(DisplacesEverybody), "displaced needlessly"),
    Control("displaces for nobody", of(DisplacesForNobody), "displaced for nobody"),
    Control("displaces an online request", of(DisplacesOnline), "is online and displaced"),
    Control("takes blocks back for nobody", of(YieldsForNobody), "back needlessly"),
    Control("copies what is not there", altered(copy_too_much), "P2: "),
    Control("copies online work", altered(copy_online), "is not to be copied"),
    Control("restores what is not there", altered(restore_too_much), "P3: "),
    Control("copies online work first", altered(copy_online_first), "and an online request is"),
    Control("restores at any price", of(RestoresAtAnyPrice), "is computed sooner"),
    Control("restores who computes", altered(restore_what_computes), "restored and granted"),
    Control("displaces who waits", altered(displace_waiting), "neither runs"),
    Control("forgets least progress", of(ForgetsLeastProgress), "P0: "),
    Control("forgets late online requests", of(ForgetsOnlineMinimum), "P0: running online"),
    Control("gives promised blocks away", of(GivesPromisedBlocksAway), "free blocks"),
    Control("counts shared blocks as freed", of(CountsSharedAsFreed), "displaced needlessly"),
    Control("takes chat's memory", of(TakesChatsMemory), "starts in chat's room to remember"),
    Control("cuts prompts", of(CutsPrompts), "its prompt cannot be cut"),
    Control("more slots than there are", of(MoreSlots), "into . slots"),
    Control("more tokens than there are", of(MoreTokens), "tokens in a step"),
    Control("P7: classes mixed up", altered(shift_tokens), "P7: the plan's token counts"),
    Control("P7: floor miscounted", altered(miscount_floor), "P7: more floor tokens"),
    Control("P7: shape", altered(misshape), "P7: the plan's shape"),
    Control("P7: predicted time", altered(mispredict), "P7: the predicted time"),
    Control("grants to a stranger", altered(grant_stranger), "unknown request stranger"),
    Control("grants more than is left", altered(grant_too_much), "tokens granted"),
    Control("grants of nothing", altered(grant_nothing), ": 0 of .* tokens granted"),
]


@pytest.mark.parametrize("settings", LEVELS.values(), ids=LEVELS.keys())
@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_the_policy_itself_passes_every_scene(scene: Snapshot, settings: PolicySettings) -> None:
    invariants.check(scene, decide(scene, MODEL, settings), MODEL, settings)


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.name)
def test_a_careless_variant_is_caught(control: Control) -> None:
    caught = []
    for scene, settings in product(SCENES.values(), LEVELS.values()):
        try:
            invariants.check(scene, control.planner(scene, settings), MODEL, settings)
        except InvariantError as error:
            caught.append(str(error))
    assert any(re.search(control.message, message) for message in caught), caught
