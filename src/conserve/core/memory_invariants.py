"""What every plan must satisfy of blocks and slots: nobody yields needlessly, all find room."""

from __future__ import annotations

from conserve.core.invariant_case import Case, require
from conserve.core.resource_invariants import arrivals, embeds_left
from conserve.core.resources import media_in
from conserve.core.snapshot import RequestView


def check_displacement(case: Case) -> None:
    victims: list[RequestView] = []
    held: list[RequestView] = []
    for name in case.plan.displace:
        view = case.by_id[name]
        holds = case.runs(view) or view.num_blocks > 0
        require(holds, f"{name} is displaced but neither runs nor holds blocks")
        require(not view.online, f"{name} is online and displaced")
        require(name not in case.plan.grants, f"{name} is displaced and granted tokens")
        require(name not in case.plan.restore, f"{name} is displaced and restored")
        (victims if case.runs(view) else held).append(view)
    _check_needless(case, victims, held)


def _check_needless(case: Case, victims: list[RequestView], held: list[RequestView]) -> None:
    """Without any one of the victims, fewer waiting online requests could start; requests that
    hold blocks and do not run yield them to running ones as well, and to one that starts."""
    snapshot = case.snapshot
    wanting = any(media_in(v, snapshot.max_step_tokens) for v in snapshot.running if v.online)
    require(bool(snapshot.waiting_online) or wanting or not victims, "displaced for nobody")
    freed = case.freed_by((*victims, *held))
    blocks = snapshot.num_free_blocks + freed
    blocks -= case.promised(v for v in snapshot.running if v.online)
    slots = snapshot.num_free_slots + len(victims)
    for view in arrivals(case):
        need = case.lacking(view) + snapshot.sharing.at_risk(view)
        if need > blocks or slots < 1:
            break
        blocks, slots = blocks - need, slots - 1
    embeds = embeds_left(case)
    for victim in victims:
        needless = case.needed_from(victim) <= blocks and slots >= 1
        needless &= victim.num_kept_embeds <= embeds
        require(not needless, f"{victim.request_id} is displaced needlessly")
    spare = snapshot.num_free_blocks + freed
    spare -= case.promised(v for v in snapshot.running if v.request_id not in case.plan.displace)
    spare -= sum(case.lacking(v) for v in case.waiting if v.request_id in case.starts)
    if held:
        needless = sum(view.num_blocks for view in held) <= min(blocks, spare)
        require(not needless, f"{held[0].request_id} gives its blocks back needlessly")


def check_memory(case: Case) -> None:
    snapshot, displaced = case.snapshot, case.plan.displace
    admitted = [view for view in case.waiting if view.request_id in case.starts]
    if not admitted:
        return
    # Online requests may start on blocks promised to offline ones, never the reverse.
    offline = any(not view.online for view in admitted)
    staying = [view for view in snapshot.running if view.request_id not in displaced]
    need = sum(case.lacking(view) for view in admitted)
    need += case.promised(view for view in staying if view.online or offline)
    free = snapshot.num_free_blocks + case.freed_by(case.by_id[i] for i in displaced)
    require(need <= free, f"admitted into {free} free blocks, {need} needed")
    _check_room(case, admitted, free - need)
    slots = snapshot.num_free_slots + len(case.running.intersection(displaced))
    require(len(admitted) <= slots, f"admitted {len(admitted)} into {slots} slots")


def _check_room(case: Case, admitted: list[RequestView], left: int) -> None:
    """Chat's room to remember stays free of offline requests that start, but for the first where
    none runs, and for those that hold their blocks already. `left`: blocks free once all have what
    they need."""
    plan, snapshot = case.plan, case.snapshot
    offline = [view for view in admitted if not view.online]
    takes = [view for view in offline if not view.num_blocks]
    stays = any(not v.online and v.request_id not in plan.displace for v in snapshot.running)
    if takes and (stays or takes != offline[:1]):
        room = snapshot.num_remembered_blocks
        held = sum(case.lacking(view) for view in admitted if view.num_blocks)
        require(left + held >= room, f"{takes[-1].request_id} starts in chat's room to remember")
