"""What to copy to the host, and whether a displaced request comes back by copy or by computing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from conserve.core.blocks import blocks_cost
from conserve.core.displacement import victim_order
from conserve.core.latency import LatencyModel
from conserve.core.snapshot import RequestView, Snapshot

COPY_SHARE = 0.25
"""Of the link's speed, for copies that nobody waits for."""
LONGEST_GAP_S = 0.5
"""A longer pause between two steps earns no more copying than this one."""


def copy_budget(elapsed_s: float, rate: float, queued: float) -> float:
    """What may be queued for the host now, in units of which `rate` a second may be copied:
    what the time since the last step earned, less whatever more than that is queued still."""
    budget = rate * min(max(elapsed_s, 0.0), LONGEST_GAP_S)
    return min(budget, max(0.0, 2 * budget - queued))


def least_tail(block_size: int) -> int:
    """New tokens that make a partly filled block worth a copy: a quarter of a block. The rest is
    copied when the request is displaced."""
    return max(1, block_size // 4)


def copies_by_class(
    offline: Sequence[RequestView], online: Sequence[RequestView], snapshot: Snapshot
) -> dict[str, int]:
    """request_id -> leading tokens to have on the host: what offline requests need first, and of
    online ones whole blocks with what that leaves of the budget. Others find those by their
    hash, and a partly filled block has none."""
    budget, size = snapshot.copy_tokens, snapshot.block_size
    if not budget:
        return {}
    chosen = choose_copies(offline, budget, size, snapshot.copy_tail)
    if not snapshot.copies_online:
        return chosen
    for view in offline:
        if end := chosen.get(view.request_id):
            start = max(view.num_copying_tokens, view.num_checkpointed_tokens)
            budget -= blocks_cost(start - start % size, end, size)
    return chosen | choose_copies(online, budget, size, size)


def choose_copies(
    requests: Iterable[RequestView], budget_tokens: int, block_size: int = 1, least_tail: int = 1
) -> dict[str, int]:
    """request_id -> leading tokens to have on the host, copying `budget_tokens` at most.

    Where not all can be paid for, the cheapest to displace come first, since they go first.
    Blocks are copied whole: a partly filled last block costs as much as a full one and is copied
    once `least_tail` of its tokens are new; what is missing of it when the request is displaced
    is copied then.
    """
    size = block_size
    # Most have nothing to copy in most steps: this much is looked at for every request.
    due = [
        request
        for request in requests
        if (
            (computed := request.num_computed_tokens) - request.num_copying_tokens >= least_tail
            or computed - computed % size > request.num_copying_tokens
        )
        and request.can_restore
    ]
    wanted: list[tuple[RequestView, int, int, int]] = []
    total = 0
    for request in due:
        start, end = request.num_copying_tokens, request.num_computed_tokens
        if start < request.num_checkpointed_tokens:
            start = request.num_checkpointed_tokens
        whole = end - end % size
        if end - (start if start > whole else whole) < least_tail:
            end = whole
        if end > start:
            first = start - start % size
            cost = -(-(end - first) // size) * size  # `blocks_cost`
            total += cost
            wanted.append((request, start, end, cost))
    if total <= budget_tokens:
        return {request.request_id: end for request, _, end, _ in wanted}
    return _pay(wanted, budget_tokens, size)


def _pay(
    wanted: list[tuple[RequestView, int, int, int]], budget_tokens: int, block_size: int
) -> dict[str, int]:
    """As much of (request, start, end, cost) as the budget pays for, in victims' order."""
    chosen: dict[str, int] = {}
    for request, start, end, cost in sorted(wanted, key=lambda one: victim_order(one[0])):
        if budget_tokens < 1:
            break
        if cost > budget_tokens:
            first = start - start % block_size
            end = first + budget_tokens - budget_tokens % block_size
            cost = blocks_cost(first, end, block_size)
        if end > start:
            chosen[request.request_id] = end
            budget_tokens -= cost
    return chosen


def tokens_to_restore(
    request: RequestView,
    num_cached_tokens: int,
    prefill_s: Callable[[int, int], float],
    tokens_per_s: float,
    queue_s: float = 0.0,
) -> int:
    """Leading tokens to bring back from the checkpoint; 0 where computing them is quicker.

    `prefill_s(tokens, context)` is what computing takes (`LatencyModel.predict_prefill_s`),
    `num_cached_tokens` are on the device still, `queue_s` is how long the link is busy with
    others. At least one token is left to compute, since only that yields the next one.

    Restoring k of the tokens behind the cached ones costs k / rate, and spares computing them:
    a * k + b * (k * cached + k * k / 2). The gain is convex in k, so its best is at an end:
    all that the checkpoint holds or nothing. What the checkpoint lacks is computed.
    """
    if tokens_per_s <= 0:
        return 0
    end = min(request.num_checkpointed_tokens, request.num_tokens - 1)
    missing = end - num_cached_tokens
    if missing <= 0:
        return 0
    restore_s = queue_s + missing / tokens_per_s
    return end if restore_s < prefill_s(missing, num_cached_tokens) else 0


def num_restorable(request: RequestView, snapshot: Snapshot, model: LatencyModel) -> int:
    """`tokens_to_restore` of a waiting offline request, unless it holds its blocks already."""
    if request.num_blocks or not request.num_checkpointed_tokens:
        return 0
    return tokens_to_restore(
        request,
        request.num_computed_tokens,
        model.predict_prefill_s,
        snapshot.restore_tokens_per_s,
        snapshot.restore_queue_s,
    )


def tokens_worth_waiting_for(
    request: RequestView, snapshot: Snapshot, model: LatencyModel, longest_step_s: float
) -> int:
    """Leading tokens to bring back of a waiting online request, which another left on the host
    that began alike; 0 where the first token comes sooner if all of it is computed.

    Both ways end with the prefill of what is not there. Before it, a restore takes the link and
    two steps: the one beside which the KV comes, and the one that is decided meanwhile.
    """
    if request.num_blocks or not request.num_checkpointed_tokens or not request.can_restore:
        return 0
    cached, rate = request.num_computed_tokens, snapshot.restore_tokens_per_s
    end = min(request.num_checkpointed_tokens, request.num_tokens - 1)
    if end <= cached or rate <= 0:
        return 0
    restored_s = snapshot.restore_queue_s + (end - cached) / rate + 2 * longest_step_s
    restored_s += model.predict_prefill_s(request.num_tokens - end, end)
    computed_s = model.predict_prefill_s(request.num_tokens - cached, cached)
    return end if restored_s < computed_s else 0


def copy_is_quicker(
    num_copied_tokens: float, num_lost_tokens: int, context: int, model: LatencyModel, rate: float
) -> bool:
    """Whether to wait for `num_copied_tokens` (at `rate` a second) that save a displaced request
    from computing `num_lost_tokens` behind `context` others again."""
    if rate <= 0:
        return False
    return num_copied_tokens / rate < model.predict_prefill_s(num_lost_tokens, context)
