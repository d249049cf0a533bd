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
    case = _Case(snapshot, plan, model, settings or PolicySettings())
    _check_grants(case)
    _check_accounting(case)
    _check_displacement(case)
    _check_memory(case)
    _check_checkpoints(case)
    _check_stopping(case)
    if not case.settings.fixed_step_tokens:
        _check_isolation(case)
        _check_unstoppable(case)
    _check_liveness(case)


class _Case:
    """A plan beside the snapshot that it was made for."""

    def __init__(
        self, snapshot: Snapshot, plan: Plan, model: LatencyModel, settings: PolicySettings
    ) -> None:
        self.snapshot, self.plan, self.model, self.settings = snapshot, plan, model, settings
        self.waiting = (*snapshot.waiting_online, *snapshot.waiting_offline)
        self.by_id = {view.request_id: view for view in (*snapshot.running, *self.waiting)}
        self.running = {view.request_id for view in snapshot.running}
        self.starts = {*plan.grants, *plan.restore}
        self.longest_s = plan.predicted_s * (1 + model.margin)

    @property
    def granted(self) -> list[RequestView]:
        return [self.by_id[request_id] for request_id in self.plan.grants]

    def runs(self, view: RequestView) -> bool:
        return view.request_id in self.running

    def decodes(self, view: RequestView) -> bool:
        left = view.num_tokens - view.num_computed_tokens
        return view.last_token_s is not None and left <= self.snapshot.decode_width

    def lacking(self, view: RequestView) -> int:
        return lacking_blocks(view, self.snapshot.block_size)

    def promised(self, views: Iterable[RequestView]) -> int:
        return promised_blocks(views, self.snapshot.block_size)

    def shape_of(self, views: Iterable[RequestView]) -> StepShape:
        """What the plan grants to `views`; whoever waits starts with a prefill."""
        shape = StepShape()
        for view in views:
            decodes = self.runs(view) and self.decodes(view)
            add = shape.add_decode if decodes else shape.add_prefill
            add(self.plan.grants[view.request_id], view.num_computed_tokens)
        return shape


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InvariantError(message)


def _check_grants(case: _Case) -> None:
    for request_id, tokens in case.plan.grants.items():
        view = case.by_id.get(request_id)
        _require(view is not None, f"grant to unknown request {request_id}")
        assert view is not None
        left = view.num_tokens - view.num_computed_tokens
        _require(0 < tokens <= left, f"{request_id}: {tokens} of {left} tokens granted")
    total = sum(case.plan.grants.values())
    _require(total <= case.snapshot.max_step_tokens, f"{total} tokens in a step")


def _check_accounting(case: _Case) -> None:
    """P7: what the plan says of itself is what its grants add up to."""
    plan = case.plan
    online = sum(plan.grants[view.request_id] for view in case.granted if view.online)
    offline = sum(plan.grants.values()) - online
    _require(
        (online, offline) == (plan.num_online_tokens, plan.num_offline_tokens),
        "P7: the plan's token counts disagree with its grants",
    )
    _require(0 <= plan.num_floor_tokens <= offline, "P7: more floor tokens than offline tokens")
    shape = case.shape_of(case.granted)
    _require(
        (shape.num_tokens, shape.num_decodes, shape.decode_context)
        == (plan.shape.num_tokens, plan.shape.num_decodes, plan.shape.decode_context)
        and math.isclose(shape.attention_pairs, plan.shape.attention_pairs, rel_tol=1e-9),
        "P7: the plan's shape disagrees with its grants",
    )
    predicted_s = case.model.predict_s(shape)
    _require(
        math.isclose(predicted_s, plan.predicted_s, rel_tol=1e-9, abs_tol=EPSILON),
        "P7: the predicted time is not the shape's",
    )


def _check_displacement(case: _Case) -> None:
    victims: list[RequestView] = []
    held: list[RequestView] = []
    for name in case.plan.displace:
        view = case.by_id[name]
        holds = case.runs(view) or view.num_blocks > 0
        _require(holds, f"{name} is displaced but neither runs nor holds blocks")
        _require(not view.online, f"{name} is online and displaced")
        _require(name not in case.plan.grants, f"{name} is displaced and granted tokens")
        _require(name not in case.plan.restore, f"{name} is displaced and restored")
        (victims if case.runs(view) else held).append(view)
    _check_needless(case, victims, held)


def _check_needless(case: _Case, victims: list[RequestView], held: list[RequestView]) -> None:
    """Without any one of the victims, fewer waiting online requests could start; requests that
    hold blocks and do not run yield them to running ones as well, and to one that starts."""
    snapshot = case.snapshot
    _require(bool(snapshot.waiting_online) or not victims, "displaced for nobody")
    freed = sum(v.num_blocks for v in (*victims, *held))
    blocks = snapshot.num_free_blocks + freed
    blocks -= case.promised(v for v in snapshot.running if v.online)
    slots = snapshot.num_free_slots + len(victims)
    for view in snapshot.waiting_online:
        need = case.lacking(view)
        if need > blocks or slots < 1:
            break
        blocks, slots = blocks - need, slots - 1
    for victim in victims:
        needless = victim.num_blocks <= blocks and slots >= 1
        _require(not needless, f"{victim.request_id} is displaced needlessly")
    spare = snapshot.num_free_blocks + freed
    spare -= case.promised(v for v in snapshot.running if v.request_id not in case.plan.displace)
    spare -= sum(case.lacking(v) for v in case.waiting if v.request_id in case.starts)
    if held:
        needless = sum(view.num_blocks for view in held) <= min(blocks, spare)
        _require(not needless, f"{held[0].request_id} gives its blocks back needlessly")


def _check_memory(case: _Case) -> None:
    snapshot, displaced = case.snapshot, case.plan.displace
    admitted = [view for view in case.waiting if view.request_id in case.starts]
    if not admitted:
        return
    # Online requests may start on blocks promised to offline ones, never the reverse.
    offline = any(not view.online for view in admitted)
    staying = [view for view in snapshot.running if view.request_id not in displaced]
    need = sum(case.lacking(view) for view in admitted)
    need += case.promised(view for view in staying if view.online or offline)
    free = snapshot.num_free_blocks + sum(case.by_id[i].num_blocks for i in displaced)
    _require(need <= free, f"admitted into {free} free blocks, {need} needed")
    _check_room(case, admitted, free - need)
    slots = snapshot.num_free_slots + len(case.running.intersection(displaced))
    _require(len(admitted) <= slots, f"admitted {len(admitted)} into {slots} slots")


def _check_room(case: _Case, admitted: list[RequestView], left: int) -> None:
    """Chat's room to remember stays free of offline requests that start, but for the only one and
    for those that hold their blocks already. `left`: blocks free once all have what they need."""
    plan, snapshot = case.plan, case.snapshot
    takes = [view for view in admitted if not view.online and not view.num_blocks]
    stays = any(not v.online and v.request_id not in plan.displace for v in snapshot.running)
    others = stays or len([view for view in admitted if not view.online]) > 1
    if takes and others:
        room = snapshot.num_remembered_blocks
        held = sum(case.lacking(view) for view in admitted if view.num_blocks)
        _require(left + held >= room, f"{takes[-1].request_id} starts in chat's room to remember")


def _check_checkpoints(case: _Case) -> None:
    """Only what is computed is copied, only what is copied is restored, and neither for all."""
    for request_id, end in case.plan.checkpoint.items():
        view = case.by_id[request_id]
        of_class = case.snapshot.copies_online or not view.online
        copied = of_class and view.can_restore and case.runs(view)
        _require(copied, f"{request_id} is not to be copied")
        _require(end <= view.num_computed_tokens, f"P2: {request_id} is copied past its KV")
    for request_id, end in case.plan.restore.items():
        view = case.by_id[request_id]
        _require(request_id not in case.plan.grants, f"{request_id} is restored and granted tokens")
        _require(not case.runs(view), f"{request_id} runs and is restored")
        there = min(view.num_checkpointed_tokens, view.num_tokens - 1)
        in_reach = view.num_computed_tokens < end <= there
        _require(in_reach, f"P3: {request_id} restores {end} tokens")
        if view.online:
            _check_quicker(case, view, end)
    _check_offline_copies_first(case)


def _check_quicker(case: _Case, view: RequestView, end: int) -> None:
    """No online request waits for a copy longer than computing its tokens takes."""
    snapshot, cached = case.snapshot, view.num_computed_tokens
    restored_s = (end - cached) / snapshot.restore_tokens_per_s + snapshot.restore_queue_s
    computed_s = case.model.predict_prefill_s(view.num_tokens - cached, cached)
    _require(restored_s < computed_s, f"{view.request_id} waits for what is computed sooner")


def _check_offline_copies_first(case: _Case) -> None:
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
        _require(not behind, f"{view.request_id} is not copied, and an online request is")


def _check_stopping(case: _Case) -> None:
    snapshot, plan, settings = case.snapshot, case.plan, case.settings
    if not plan.stoppable:
        return
    _require(snapshot.can_stop, "a stoppable step in an engine that cannot stop one")
    due = []
    for view in case.granted:
        decodes = case.runs(view) and case.decodes(view)
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
        case.longest_s <= share_s + EPSILON,
        "P5: a stop leaves online tokens too little of their slack",
    )


def _check_isolation(case: _Case) -> None:
    """P5: no offline token in a step predicted to break an online target."""
    snapshot, plan = case.snapshot, case.plan
    online = [view for view in case.granted if view.online]
    if not online or not plan.num_offline_tokens or plan.num_floor_tokens:
        return
    room = snapshot.max_step_tokens - plan.num_online_tokens
    for view in snapshot.running:
        left_out = view.online and view.request_id not in plan.grants and case.decodes(view)
        fits = 0 < view.num_tokens - view.num_computed_tokens <= room
        _require(not (left_out and fits), f"P5: {view.request_id} yields to offline tokens")
    due = [v.last_token_s for v in online if v.last_token_s is not None and case.decodes(v)]
    if due:
        slack_s = min(due) + snapshot.targets.tbt_s - snapshot.now_s
        _require(
            case.longest_s <= slack_s + EPSILON,
            "P5: offline tokens in a step that breaks a TBT target",
        )
    if len(due) < len(online):
        online_s = case.model.predict_s(case.shape_of(online))
        _require(
            plan.predicted_s <= online_s * (1 + case.settings.prefill_stretch) + EPSILON,
            "P5: offline tokens stretch a step with a first token in it",
        )


def _check_unstoppable(case: _Case) -> None:
    """An offline step that cannot be stopped is short, or one request's least progress."""
    snapshot, plan, settings = case.snapshot, case.plan, case.settings
    if plan.stoppable or any(view.online for view in snapshot.running):
        return
    if plan.num_online_tokens or not plan.grants:
        return
    least = max(settings.min_chunk, snapshot.decode_width)
    if len(plan.grants) == 1 and plan.num_offline_tokens <= least:
        return
    limit_s = snapshot.targets.ttft_s * settings.unstoppable_share
    _require(case.longest_s <= limit_s + EPSILON, "a long offline step that cannot be stopped")


def _check_liveness(case: _Case) -> None:
    """P0, one step of it: work that can run does not wait for ever behind nothing."""
    snapshot, plan = case.snapshot, case.plan
    runnable = [v for v in snapshot.running if v.num_tokens > v.num_computed_tokens]
    if any(v.online for v in runnable):
        _require(plan.num_online_tokens > 0, "P0: running online requests and no online token")
    elif len(plan.displace) < len(runnable):
        _require(bool(plan.grants), "P0: running requests and an empty step")
    if snapshot.running:
        return
    for view in case.waiting[:1]:
        fits = case.lacking(view) <= snapshot.num_free_blocks
        if fits and snapshot.num_free_slots and view.num_tokens > view.num_computed_tokens:
            _require(view.request_id in case.starts, f"P0: {view.request_id} waits for nothing")
