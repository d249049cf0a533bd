"""What every plan must satisfy, whoever made it. Cheap enough to run in tests and in debugging."""

from __future__ import annotations

import math
from collections.abc import Iterable

from conserve.core.blocks import lacking_blocks, promised_blocks
from conserve.core.latency import LatencyModel, StepShape
from conserve.core.plan import Plan
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import RequestView, Snapshot

EPSILON = 1e-9


class InvariantError(AssertionError):
    """A plan that must never reach an engine; names the property and the request."""


def check(
    snapshot: Snapshot, plan: Plan, model: LatencyModel, settings: PolicySettings | None = None
) -> None:
    """Raise InvariantError on the first property that `plan` breaks."""
    settings = settings or PolicySettings()
    views = (*snapshot.running, *snapshot.waiting_online, *snapshot.waiting_offline)
    by_id = {view.request_id: view for view in views}
    _check_grants(snapshot, plan, by_id)
    _check_accounting(snapshot, plan, model, by_id)
    _check_displacement(snapshot, plan, by_id)
    _check_memory(snapshot, plan, by_id)
    _check_checkpoints(snapshot, plan, by_id)
    _check_stopping(snapshot, plan, by_id, model, settings)
    if not settings.fixed_step_tokens:
        _check_isolation(snapshot, plan, model, by_id, settings)
        _check_unstoppable(snapshot, plan, model, settings)
    _check_liveness(snapshot, plan)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InvariantError(message)


def _check_grants(snapshot: Snapshot, plan: Plan, by_id: dict[str, RequestView]) -> None:
    for request_id, tokens in plan.grants.items():
        view = by_id.get(request_id)
        _require(view is not None, f"grant to unknown request {request_id}")
        assert view is not None
        remaining = view.num_tokens - view.num_computed_tokens
        _require(0 < tokens <= remaining, f"{request_id}: {tokens} of {remaining} tokens granted")
    total = sum(plan.grants.values())
    _require(total <= snapshot.max_step_tokens, f"{total} tokens in a step")


def _check_accounting(
    snapshot: Snapshot, plan: Plan, model: LatencyModel, by_id: dict[str, RequestView]
) -> None:
    """P7: what the plan says of itself is what its grants add up to."""
    online = sum(tokens for i, tokens in plan.grants.items() if by_id[i].online)
    offline = sum(plan.grants.values()) - online
    _require(
        (online, offline) == (plan.num_online_tokens, plan.num_offline_tokens),
        "P7: the plan's token counts disagree with its grants",
    )
    _require(0 <= plan.num_floor_tokens <= offline, "P7: more floor tokens than offline tokens")
    shape = shape_of(snapshot, plan, (by_id[i] for i in plan.grants))
    _require(
        (shape.num_tokens, shape.num_decodes, shape.decode_context)
        == (plan.shape.num_tokens, plan.shape.num_decodes, plan.shape.decode_context)
        and math.isclose(shape.attention_pairs, plan.shape.attention_pairs, rel_tol=1e-9),
        "P7: the plan's shape disagrees with its grants",
    )
    predicted_s = model.predict_s(shape)
    _require(
        math.isclose(predicted_s, plan.predicted_s, rel_tol=1e-9, abs_tol=EPSILON),
        "P7: the predicted time is not the shape's",
    )


def shape_of(snapshot: Snapshot, plan: Plan, views: Iterable[RequestView]) -> StepShape:
    """The shape of what `plan` grants to `views`; whoever waits starts with a prefill."""
    running = {view.request_id for view in snapshot.running}
    shape = StepShape()
    for view in views:
        decodes = view.request_id in running and _decodes(view, snapshot)
        add = shape.add_decode if decodes else shape.add_prefill
        add(plan.grants[view.request_id], view.num_computed_tokens)
    return shape


def _decodes(view: RequestView, snapshot: Snapshot) -> bool:
    remaining = view.num_tokens - view.num_computed_tokens
    return view.last_token_s is not None and remaining <= snapshot.decode_width


def _check_displacement(snapshot: Snapshot, plan: Plan, by_id: dict[str, RequestView]) -> None:
    running = {view.request_id for view in snapshot.running}
    victims: list[RequestView] = []
    held: list[RequestView] = []
    for request_id in plan.displace:
        view = by_id[request_id]
        _require(
            request_id in running or view.num_blocks > 0,
            f"{request_id} is displaced but neither runs nor holds blocks",
        )
        _require(not view.online, f"{request_id} is online and displaced")
        _require(request_id not in plan.grants, f"{request_id} is displaced and granted tokens")
        _require(request_id not in plan.restore, f"{request_id} is displaced and restored")
        (victims if request_id in running else held).append(view)
    _check_needless(snapshot, plan, victims, held)


def _check_needless(
    snapshot: Snapshot, plan: Plan, victims: list[RequestView], held: list[RequestView]
) -> None:
    """Without any one of the victims, fewer waiting online requests could start; requests that
    hold blocks and do not run yield them to running ones as well, and to one that starts."""
    _require(bool(snapshot.waiting_online) or not victims, "displaced for nobody")
    freed = sum(v.num_blocks for v in (*victims, *held))
    promised = promised_blocks((v for v in snapshot.running if v.online), snapshot.block_size)
    blocks = snapshot.num_free_blocks - promised + freed
    slots = snapshot.num_free_slots + len(victims)
    for view in snapshot.waiting_online:
        need = lacking_blocks(view, snapshot.block_size)
        if need > blocks or slots < 1:
            break
        blocks, slots = blocks - need, slots - 1
    for victim in victims:
        needless = victim.num_blocks <= blocks and slots >= 1
        _require(not needless, f"{victim.request_id} is displaced needlessly")
    gone, starts = {*plan.displace}, {*plan.grants, *plan.restore}
    spare = snapshot.num_free_blocks + freed
    spare -= promised_blocks(
        (v for v in snapshot.running if v.request_id not in gone), snapshot.block_size
    )
    waiting = (*snapshot.waiting_online, *snapshot.waiting_offline)
    spare -= sum(lacking_blocks(v, snapshot.block_size) for v in waiting if v.request_id in starts)
    if held:
        needless = sum(view.num_blocks for view in held) <= min(blocks, spare)
        _require(not needless, f"{held[0].request_id} gives its blocks back needlessly")


def _check_memory(snapshot: Snapshot, plan: Plan, by_id: dict[str, RequestView]) -> None:
    waiting = (*snapshot.waiting_online, *snapshot.waiting_offline)
    starts = {*plan.grants, *plan.restore}
    admitted = [view for view in waiting if view.request_id in starts]
    if not admitted:
        return
    # Online requests may start on blocks promised to offline ones, never the reverse.
    offline = any(not view.online for view in admitted)
    keep = [
        view
        for view in snapshot.running
        if view.request_id not in plan.displace and (view.online or offline)
    ]
    need = sum(lacking_blocks(view, snapshot.block_size) for view in admitted)
    need += promised_blocks(keep, snapshot.block_size)
    free = snapshot.num_free_blocks + sum(by_id[i].num_blocks for i in plan.displace)
    _require(need <= free, f"admitted into {free} free blocks, {need} needed")
    running = {view.request_id for view in snapshot.running}
    slots = snapshot.num_free_slots + len(running.intersection(plan.displace))
    _require(len(admitted) <= slots, f"admitted {len(admitted)} into {slots} slots")


def _check_checkpoints(snapshot: Snapshot, plan: Plan, by_id: dict[str, RequestView]) -> None:
    """Only what is computed is copied, only what is copied is restored, and neither for all."""
    running = {view.request_id for view in snapshot.running}
    for request_id, end in plan.checkpoint.items():
        view = by_id[request_id]
        copied = not view.online and view.can_restore and request_id in running
        _require(copied, f"{request_id} is not to be copied")
        _require(end <= view.num_computed_tokens, f"P2: {request_id} is copied past its KV")
    for request_id, end in plan.restore.items():
        view = by_id[request_id]
        _require(request_id not in plan.grants, f"{request_id} is restored and granted tokens")
        _require(request_id not in running, f"{request_id} runs and is restored")
        _require(
            view.num_computed_tokens < end <= view.num_checkpointed_tokens
            and end < view.num_tokens,
            f"P3: {request_id} restores {end} tokens",
        )


def _check_stopping(
    snapshot: Snapshot,
    plan: Plan,
    by_id: dict[str, RequestView],
    model: LatencyModel,
    settings: PolicySettings,
) -> None:
    if not plan.stoppable:
        return
    _require(snapshot.can_stop, "a stoppable step in an engine that cannot stop one")
    running = {view.request_id for view in snapshot.running}
    due = []
    for view in (by_id[request_id] for request_id in plan.grants):
        decodes = view.request_id in running and _decodes(view, snapshot)
        _require(decodes or not view.online, "a stoppable step carries online prompts")
        _require(
            view.num_stops < settings.max_stops,
            f"P0: {view.request_id} was stopped {view.num_stops} times and may be again",
        )
        if view.online and view.last_token_s is not None:
            due.append(view.last_token_s + snapshot.targets.tbt_s)
    if not due or plan.num_floor_tokens:
        return
    _require(plan.due_s <= min(due) + EPSILON, "P5: a stop may come when a token is due")
    share_s = (min(due) - snapshot.now_s) * settings.stoppable_slack_fill
    _require(
        plan.predicted_s * (1 + model.margin) <= share_s + EPSILON,
        "P5: a stop leaves online tokens too little of their slack",
    )


def _check_isolation(
    snapshot: Snapshot,
    plan: Plan,
    model: LatencyModel,
    by_id: dict[str, RequestView],
    settings: PolicySettings,
) -> None:
    """P5: no offline token in a step predicted to break an online target."""
    online = [by_id[i] for i in plan.grants if by_id[i].online]
    if not online or not plan.num_offline_tokens or plan.num_floor_tokens:
        return
    room = snapshot.max_step_tokens - plan.num_online_tokens
    for view in snapshot.running:
        left_out = view.online and view.request_id not in plan.grants and _decodes(view, snapshot)
        fits = 0 < view.num_tokens - view.num_computed_tokens <= room
        _require(not (left_out and fits), f"P5: {view.request_id} yields to offline tokens")
    with_margin = 1 + model.margin
    due = [v.last_token_s for v in online if v.last_token_s is not None and _decodes(v, snapshot)]
    if due:
        slack_s = min(due) + snapshot.targets.tbt_s - snapshot.now_s
        _require(
            plan.predicted_s * with_margin <= slack_s + EPSILON,
            "P5: offline tokens in a step that breaks a TBT target",
        )
    if len(due) < len(online):
        online_s = model.predict_s(shape_of(snapshot, plan, online))
        _require(
            plan.predicted_s <= online_s * (1 + settings.prefill_stretch) + EPSILON,
            "P5: offline tokens stretch a step with a first token in it",
        )


def _check_unstoppable(
    snapshot: Snapshot, plan: Plan, model: LatencyModel, settings: PolicySettings
) -> None:
    """An offline step that cannot be stopped is short, or one request's least progress."""
    if plan.stoppable or any(view.online for view in snapshot.running):
        return
    if plan.num_online_tokens or not plan.grants:
        return
    if len(plan.grants) == 1:
        least = max(settings.min_chunk, snapshot.decode_width)
        if plan.num_offline_tokens <= least:
            return
    limit_s = snapshot.targets.ttft_s * settings.unstoppable_share
    _require(
        plan.predicted_s * (1 + model.margin) <= limit_s + EPSILON,
        "a long offline step that cannot be stopped",
    )


def _check_liveness(snapshot: Snapshot, plan: Plan) -> None:
    """P0, one step of it: work that can run does not wait for ever behind nothing."""
    runnable = [v for v in snapshot.running if v.num_tokens > v.num_computed_tokens]
    if any(v.online for v in runnable):
        _require(plan.num_online_tokens > 0, "P0: running online requests and no online token")
    elif len(plan.displace) < len(runnable):
        _require(bool(plan.grants), "P0: running requests and an empty step")
    if snapshot.running:
        return
    head = (*snapshot.waiting_online, *snapshot.waiting_offline)[:1]
    for view in head:
        fits = lacking_blocks(view, snapshot.block_size) <= snapshot.num_free_blocks
        if fits and snapshot.num_free_slots and view.num_tokens > view.num_computed_tokens:
            started = view.request_id in plan.grants or view.request_id in plan.restore
            _require(started, f"P0: {view.request_id} waits for nothing")
