"""What every plan must satisfy, whoever made it. Cheap enough to run in tests and in debugging."""

from __future__ import annotations

from conserve.core.displacement import blocks_for
from conserve.core.latency import LatencyModel
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
    _check_displacement(snapshot, plan, by_id)
    _check_memory(snapshot, plan, by_id)
    _check_isolation(snapshot, plan, model, by_id, settings)
    _check_liveness(snapshot, plan, settings)


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
    _require(
        total == plan.shape.num_tokens == plan.num_online_tokens + plan.num_offline_tokens,
        "P7: the plan's token counts disagree",
    )


def _check_displacement(snapshot: Snapshot, plan: Plan, by_id: dict[str, RequestView]) -> None:
    running = {view.request_id for view in snapshot.running}
    for request_id in plan.displace:
        _require(request_id in running, f"{request_id} is displaced but does not run")
        _require(not by_id[request_id].online, f"{request_id} is online and displaced")
        _require(request_id not in plan.grants, f"{request_id} is displaced and granted tokens")
    _require(not plan.displace or bool(snapshot.waiting_online), "displaced for nobody")


def _check_memory(snapshot: Snapshot, plan: Plan, by_id: dict[str, RequestView]) -> None:
    waiting = (*snapshot.waiting_online, *snapshot.waiting_offline)
    admitted = [view for view in waiting if view.request_id in plan.grants]
    need = sum(blocks_for(view.num_tokens, snapshot.block_size) for view in admitted)
    freed = sum(by_id[request_id].num_blocks for request_id in plan.displace)
    _require(need <= snapshot.num_free_blocks + freed, f"admitted {need} blocks too many")
    slots = snapshot.num_free_slots + len(plan.displace)
    _require(len(admitted) <= slots, f"admitted {len(admitted)} into {slots} slots")


def _check_isolation(
    snapshot: Snapshot,
    plan: Plan,
    model: LatencyModel,
    by_id: dict[str, RequestView],
    settings: PolicySettings,
) -> None:
    """P5: no offline token in a step predicted to break an online target."""
    online = [by_id[i] for i in plan.grants if by_id[i].online]
    _require(not (plan.stoppable and online), "a stoppable step carries online work")
    if settings.fixed_step_tokens or plan.num_offline_tokens <= plan.num_floor_tokens:
        return
    if plan.num_floor_tokens:
        return
    due = [v.last_token_s for v in online if v.last_token_s is not None and _decodes(v, snapshot)]
    if due:
        slack_s = min(due) + snapshot.targets.tbt_s - snapshot.now_s
        _require(
            model.predict_s(plan.shape) * (1 + model.margin) <= slack_s + EPSILON,
            "P5: offline tokens in a step that breaks a TBT target",
        )


def _decodes(view: RequestView, snapshot: Snapshot) -> bool:
    return view.num_tokens - view.num_computed_tokens <= snapshot.decode_width


def _check_liveness(snapshot: Snapshot, plan: Plan, settings: PolicySettings) -> None:
    """P0, one step of it: work that can run does not wait for ever behind nothing."""
    runnable_online = [
        v for v in snapshot.running if v.online and v.num_tokens > v.num_computed_tokens
    ]
    if runnable_online:
        _require(plan.num_online_tokens > 0, "P0: running online requests and no online token")
        return
    runnable = [v for v in snapshot.running if v.num_tokens > v.num_computed_tokens]
    if runnable and len(plan.displace) < len(runnable):
        _require(bool(plan.grants), "P0: running requests and an empty step")
