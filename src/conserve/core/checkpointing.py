"""What to copy to the host, and whether a displaced request comes back by copy or by computing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from conserve.core.displacement import victim_order
from conserve.core.latency import LatencyModel
from conserve.core.snapshot import RequestView


def choose_copies(
    requests: Iterable[RequestView],
    ends: Mapping[str, int],
    budget_tokens: int,
    block_size: int = 1,
    least_tail: int = 1,
) -> dict[str, int]:
    """request_id -> leading tokens to have on the host, copying `budget_tokens` at most.

    `ends` says how many leading tokens of each request are in place. The cheapest to displace
    come first, since they go first. Blocks are copied whole: a partly filled last block costs
    as much as a full one and is copied once `least_tail` of its tokens are new; what is missing
    of it when the request is displaced is copied then.
    """
    chosen: dict[str, int] = {}
    for request in sorted(requests, key=victim_order):
        if budget_tokens < 1:
            break
        start = max(request.num_checkpointed_tokens, request.num_copying_tokens)
        end = ends[request.request_id]
        whole = end - end % block_size
        if end - max(start, whole) < least_tail:
            end = whole
        if end <= start:
            continue
        first = start - start % block_size
        cost = blocks_cost(first, end, block_size)
        if cost > budget_tokens:
            end = first + budget_tokens - budget_tokens % block_size
            cost = blocks_cost(first, end, block_size)
        if end > start:
            chosen[request.request_id] = end
            budget_tokens -= cost
    return chosen


def blocks_cost(first: int, end: int, block_size: int) -> int:
    """Tokens' worth of bytes in the blocks that [first, end) touches; `first` starts a block."""
    return -(-(end - first) // block_size) * block_size


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


def copy_is_quicker(
    num_copied_tokens: int, num_lost_tokens: int, context: int, model: LatencyModel, rate: float
) -> bool:
    """Whether to wait for `num_copied_tokens` (at `rate` a second) that save a displaced request
    from computing `num_lost_tokens` behind `context` others again."""
    if rate <= 0:
        return False
    return num_copied_tokens / rate < model.predict_prefill_s(num_lost_tokens, context)
