"""Whom vLLM may admit while it schedules, and with how many tokens: the plan's, nobody else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

from conserve.core.plan import Plan
from conserve.engine.cutting import part_of
from conserve.engine.door import RequestStatus
from conserve.engine.queue import ClassQueue
from conserve.engine.scheduler_view import SchedulerView

_BLOCKED = (
    RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR,
    RequestStatus.WAITING_FOR_REMOTE_KVS,
)
NO_GRANTS: Mapping[str, int] = {}


def promote(scheduler: SchedulerView, num_offline: int) -> None:
    """Make requests schedulable whose grammar is compiled or whose KV has arrived, so that the
    policy sees them; vLLM itself would notice only while it schedules, when they have no grant.
    Looks at the online requests and at the first `num_offline` offline ones."""
    queue = scheduler.waiting
    waiting = chain(queue.online, queue.offline_head(num_offline))
    for request in [r for r in waiting if r.status in _BLOCKED]:
        scheduler._handle_blocked_waiting_request(request)
    for request in [r for r in scheduler.kv_holding_waiting if r.status in _BLOCKED]:
        if scheduler._handle_blocked_waiting_request(request) and not request.num_computed_tokens:
            # Its load failed and it has given its blocks back, but vLLM keeps free for it what it
            # lacked, as for one whose load goes on.
            scheduler._inflight_prefills.discard(request)
            scheduler.kv_holding_waiting.remove_request(request)
            queue.add_request(request)


class Admission:
    """What vLLM may schedule: in the scope of `only`, a plan's waiting requests and its grants;
    outside of it nothing."""

    def __init__(self, scheduler: SchedulerView) -> None:
        self._scheduler = scheduler
        self._grants: Mapping[str, int] = NO_GRANTS

    def num_allowed(self, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        """Tokens that the request may have in this step, of those that vLLM wants for it."""
        granted = self._grants.get(request.request_id, 0)
        return part_of(granted, self._scheduler, request, num_computed_tokens, num_new_tokens)

    @contextmanager
    def only(self, plan: Plan) -> Iterator[None]:
        """Around one `schedule()` of vLLM's."""
        self._grants = plan.grants
        try:
            with _only_planned(self._scheduler, plan), _only_their_adapters(self._scheduler, plan):
                yield
        finally:
            self._grants = NO_GRANTS


@contextmanager
def _only_planned(scheduler: SchedulerView, plan: Plan) -> Iterator[None]:
    """vLLM admits waiting requests in its own order and ends at the first that may have no
    token, so those that the plan leaves out are kept from its sight for one `schedule()`."""
    names = [*plan.grants, *plan.restore]
    held, queue = scheduler.kv_holding_waiting, scheduler.waiting
    planned = [r for name in names if (r := scheduler.requests[name]) in queue]
    seen = ClassQueue(scheduler.promises.wait_s)
    for request in planned:
        queue.remove_request(request)
        seen.add_request(request)
    scheduler.waiting = seen
    scheduler.kv_holding_waiting = seen_held = ClassQueue(scheduler.promises.wait_s)
    for request in [r for r in held if r.request_id in plan.grants]:
        held.remove_request(request)
        seen_held.add_request(request)
    try:
        yield
    finally:
        queue.prepend_requests(seen)
        held.prepend_requests(seen_held)
        scheduler.waiting, scheduler.kv_holding_waiting = queue, held


@contextmanager
def _only_their_adapters(scheduler: SchedulerView, plan: Plan) -> Iterator[None]:
    """From 0.33 on vLLM counts the adapters of all requests that run towards those that a step may
    hold, also of those without a part in it: new ones wait for ever, or the engine ends. Whom the
    plan holds back, for an adapter that the step lacks, shows none for one `schedule()`."""
    if not scheduler.lora_config:
        yield
        return
    resting = [r for r in scheduler.running if r.lora_request and r.request_id not in plan.grants]
    adapters = [request.lora_request for request in resting]
    for request in resting:
        request.lora_request = None
    try:
        yield
    finally:
        for request, adapter in zip(resting, adapters, strict=True):
            request.lora_request = adapter


def give_blocks_back(scheduler: SchedulerView, request: Any) -> None:
    """A waiting request that holds blocks (its KV was brought back, or still is) waits without
    them. Whoever writes to them must be stopped by the caller."""
    scheduler.kv_holding_waiting.remove_request(request)
    scheduler.finished_recving_kv_req_ids.discard(request.request_id)
    scheduler.failed_recving_kv_req_ids.discard(request.request_id)
    scheduler._inflight_prefills.discard(request)
    scheduler._set_kv_fetch_stage(request, None)
    scheduler._free_request_blocks(request)
    request.num_computed_tokens = 0
    if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
        # As vLLM ends a load: the workers know nothing yet of a request that has not run.
        ran = bool(request.num_preemptions)
        request.status = RequestStatus.PREEMPTED if ran else RequestStatus.WAITING
    scheduler.waiting.add_request(request)
