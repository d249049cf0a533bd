"""What every plan must satisfy, whoever made it. Cheap enough to run in tests and in debugging."""

from __future__ import annotations

import math

from conserve.core.invariant_case import EPSILON, Case, InvariantError, require
from conserve.core.latency import LatencyModel
from conserve.core.limits import starved
from conserve.core.memory_invariants import check_displacement, check_memory
from conserve.core.plan import Plan
from conserve.core.resource_invariants import check_resources
from conserve.core.resources import media_in
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import RequestView, Snapshot

__all__ = ["InvariantError", "check"]


def check(
    snapshot: Snapshot, plan: Plan, model: LatencyModel, settings: PolicySettings | None = None
) -> None:
    """Raise InvariantError on the first property that `plan` breaks."""
    case = Case(snapshot, plan, model, settings or PolicySettings())
    _check_grants(case)
    _check_accounting(case)
    check_displacement(case)
    check_memory(case)
    check_resources(case)
    _check_checkpoints(case)
    _check_stopping(case)
    if not case.settings.fixed_step_tokens:
        _check_isolation(case)
        _check_unstoppable(case)
    _check_liveness(case)


def _check_grants(case: Case) -> None:
    for request_id, tokens in case.plan.grants.items():
        view = case.by_id.get(request_id)
        require(view is not None, f"grant to unknown request {request_id}")
        assert view is not None
        left = view.num_tokens - view.num_computed_tokens
        require(0 < tokens <= left, f"{request_id}: {tokens} of {left} tokens granted")
        whole = tokens == left or not case.snapshot.whole_prompts
        require(whole, f"{request_id}: {tokens} of {left} tokens, and its prompt cannot be cut")
    total = sum(case.plan.grants.values())
    require(total <= case.snapshot.max_step_tokens, f"{total} tokens in a step")


def _check_accounting(case: Case) -> None:
    """P7: what the plan says of itself is what its grants add up to."""
    plan = case.plan
    online = sum(plan.grants[view.request_id] for view in case.granted if view.online)
    offline = sum(plan.grants.values()) - online
    require(
        (online, offline) == (plan.num_online_tokens, plan.num_offline_tokens),
        "P7: the plan's token counts disagree with its grants",
    )
    require(0 <= plan.num_floor_tokens <= offline, "P7: more floor tokens than offline tokens")
    shape = case.shape_of(case.granted)
    require(
        (shape.num_tokens, shape.num_decodes, shape.decode_context)
        == (plan.shape.num_tokens, plan.shape.num_decodes, plan.shape.decode_context)
        and math.isclose(shape.attention_pairs, plan.shape.attention_pairs, rel_tol=1e-9),
        "P7: the plan's shape disagrees with its grants",
    )
    predicted_s = case.model.predict_s(shape)
    require(
        math.isclose(predicted_s, plan.predicted_s, rel_tol=1e-9, abs_tol=EPSILON),
        "P7: the predicted time is not the shape's",
    )


def _check_checkpoints(case: Case) -> None:
    """Only what is computed is copied, only what is copied is restored, and neither for all."""
    for request_id, end in case.plan.checkpoint.items():
        view = case.by_id[request_id]
        of_class = case.snapshot.copies_online or not view.online
        copied = of_class and view.can_restore and case.runs(view)
        require(copied, f"{request_id} is not to be copied")
        require(end <= view.num_computed_tokens, f"P2: {request_id} is copied past its KV")
    for request_id, end in case.plan.restore.items():
        view = case.by_id[request_id]
        require(request_id not in case.plan.grants, f"{request_id} is restored and granted tokens")
        require(not case.runs(view), f"{request_id} runs and is restored")
        there = min(view.num_checkpointed_tokens, view.num_tokens - 1)
        in_reach = view.num_computed_tokens < end <= there
        require(in_reach, f"P3: {request_id} restores {end} tokens")
        if view.online:
            _check_quicker(case, view, end)
    _check_offline_copies_first(case)


def _check_quicker(case: Case, view: RequestView, end: int) -> None:
    """No online request waits for a copy longer than computing its tokens takes."""
    snapshot, cached = case.snapshot, view.num_computed_tokens
    restored_s = (end - cached) / snapshot.restore_tokens_per_s + snapshot.restore_queue_s
    computed_s = case.model.predict_prefill_s(view.num_tokens - cached, cached)
    require(restored_s < computed_s, f"{view.request_id} waits for what is computed sooner")


def _check_offline_copies_first(case: Case) -> None:
    """Online requests are copied with what is left when each offline one has its whole blocks."""
    checkpoint, size = case.plan.checkpoint, case.snapshot.block_size
    if not any(case.by_id[name].online for name in checkpoint):
        return
    for view in case.snapshot.running:
        if view.online or not view.can_restore or view.request_id in case.plan.displace:
            continue
        there = max(view.num_copying_tokens, view.num_checkpointed_tokens)
        end = checkpoint.get(view.request_id, there)
        behind = view.num_computed_tokens - view.num_computed_tokens % size > end
        require(not behind, f"{view.request_id} is not copied, and an online request is")


def _check_stopping(case: Case) -> None:
    snapshot, plan, settings = case.snapshot, case.plan, case.settings
    if not plan.stoppable:
        return
    require(snapshot.can_stop, "a stoppable step in an engine that cannot stop one")
    due = []
    for view in case.granted:
        decodes = case.runs(view) and case.decodes(view)
        require(decodes or not view.online, "a stoppable step carries online prompts")
        require(
            view.num_stops < settings.max_stops,
            f"P0: {view.request_id} was stopped {view.num_stops} times and may be again",
        )
        if view.online and view.last_token_s is not None:
            due.append(snapshot.targets.next_due_s(view))
    if not due or plan.num_floor_tokens:
        return
    require(plan.due_s <= min(due) + EPSILON, "P5: a stop may come when a token is due")
    share_s = (min(due) - snapshot.now_s) * settings.stoppable_slack_fill
    require(
        case.longest_s <= share_s + EPSILON,
        "P5: a stop leaves online tokens too little of their slack",
    )


def _check_isolation(case: Case) -> None:
    """P5: no offline token in a step predicted to break an online target."""
    snapshot, plan = case.snapshot, case.plan
    online = [view for view in case.granted if view.online]
    if not online or not plan.num_offline_tokens or plan.num_floor_tokens:
        return
    room = snapshot.max_step_tokens - plan.num_online_tokens
    for view in snapshot.running:
        left_out = view.online and view.request_id not in plan.grants and case.decodes(view)
        fits = 0 < view.num_tokens - view.num_computed_tokens <= room and not view.adapter
        require(not (left_out and fits), f"P5: {view.request_id} yields to offline tokens")
    due = [snapshot.targets.next_due_s(view) for view in online if case.decodes(view)]
    if due:
        slack_s = min(due) - snapshot.now_s
        require(
            case.longest_s <= slack_s + EPSILON,
            "P5: offline tokens in a step that breaks a TBT target",
        )
    online_s = case.model.predict_s(case.shape_of(online))
    _check_slowdown(case, online_s)
    if len(due) < len(online):
        require(
            plan.predicted_s <= online_s * (1 + case.settings.prefill_stretch) + EPSILON,
            "P5: offline tokens stretch a step with a first token in it",
        )


def _check_slowdown(case: Case, online_s: float) -> None:
    """No step is longer beside what online requests would have alone than was agreed, but for one
    token of an offline request that has waited for long."""
    slowdown = case.settings.chat_slowdown
    offline = [view for view in case.granted if not view.online]
    if not slowdown or (len(offline) == 1 and starved(offline, case.snapshot.now_s)):
        return
    require(
        case.plan.predicted_s <= online_s * slowdown + EPSILON,
        "P5: offline tokens slow chat more than was agreed",
    )


def _check_unstoppable(case: Case) -> None:
    """An offline step that cannot be stopped is short, or one request's least progress."""
    snapshot, plan, settings = case.snapshot, case.plan, case.settings
    if plan.stoppable or any(view.online for view in snapshot.running):
        return
    if plan.num_online_tokens or not plan.grants:
        return
    least = max(settings.min_chunk, snapshot.decode_width)
    if len(plan.grants) == 1 and (plan.num_offline_tokens <= least or snapshot.whole_prompts):
        return
    limit_s = snapshot.targets.ttft_s * settings.unstoppable_share
    require(case.longest_s <= limit_s + EPSILON, "a long offline step that cannot be stopped")


def _check_liveness(case: Case) -> None:
    """P0, one step of it: work that can run does not wait for ever behind nothing."""
    snapshot, plan = case.snapshot, case.plan
    runnable = [v for v in snapshot.running if v.num_tokens > v.num_computed_tokens]
    # Who waits for room in the encoder's cache waits for those who compute what is in it.
    if any(v.online and not media_in(v, 1) for v in runnable):
        require(plan.num_online_tokens > 0, "P0: running online requests and no online token")
    elif len(plan.displace) < len(runnable):
        require(bool(plan.grants), "P0: running requests and an empty step")
    if snapshot.running:
        return
    for view in case.waiting[:1]:
        fits = case.lacking(view) <= snapshot.num_free_blocks
        if fits and snapshot.num_free_slots and view.num_tokens > view.num_computed_tokens:
            require(view.request_id in case.starts, f"P0: {view.request_id} waits for nothing")
