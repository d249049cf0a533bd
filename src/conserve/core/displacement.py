"""Which running offline requests make room for waiting online ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from conserve.core.snapshot import RequestView, Sharing

NO_SHARING = Sharing()


def num_servable(needs: Iterable[int], freeable: int) -> int:
    """How many waiting requests, first to last, find the blocks they need among `freeable`."""
    served = 0
    for need in needs:
        freeable -= need
        if freeable < 0:
            break
        served += 1
    return served


def victim_order(request: RequestView) -> tuple[int, float, float]:
    """The cheapest to displace first: the fewest tokens that no checkpoint covers, then the
    farthest deadline, then the latest arrival."""
    computed = request.num_computed_tokens
    return (
        computed - min(request.num_checkpointed_tokens, computed),
        -(request.deadline_s if request.deadline_s is not None else float("inf")),
        -request.arrival_s,
    )


def choose_victims(
    candidates: Sequence[RequestView],
    num_blocks: int,
    num_slots: int,
    sharing: Sharing = NO_SHARING,
    num_embeds: int = 0,
) -> list[RequestView]:
    """Offline requests to displace so that `num_blocks` more blocks, `num_slots` slots and room for
    `num_embeds` embeddings are free.

    Cheapest first: what would have to be computed again is smallest (the checkpoint covers
    the rest), then the farthest deadline, then the latest arrival. Stops as soon as enough
    is free, and spares whomever a later, larger victim made needless. Blocks that somebody else
    holds too do not become free, but for those that only candidates share, where all have to go.
    Where all candidates together are not enough, none goes.
    """
    if max(num_blocks, num_slots, num_embeds) <= 0:
        return []
    order = sorted(candidates, key=victim_order)
    freed = sharing.freed_by
    missing = num_blocks - sum(map(freed, order))
    if missing > sharing.num_among_offline or len(order) < num_slots:
        return []
    if num_embeds > sum(request.num_kept_embeds for request in order):
        return []
    if missing > 0:
        return order
    victims: list[RequestView] = []
    for request in order:
        if max(num_blocks, num_slots, num_embeds) <= 0:
            break
        for_blocks = num_blocks > 0 and freed(request)
        for_embeds = num_embeds > 0 and request.num_kept_embeds
        if num_slots <= 0 and not for_blocks and not for_embeds:
            continue
        victims.append(request)
        num_blocks -= freed(request)
        num_slots -= 1
        num_embeds -= request.num_kept_embeds
    return _without_needless(victims, num_blocks, num_slots, num_embeds, sharing)


def _without_needless(
    victims: list[RequestView],
    spare_blocks: int,
    spare_slots: int,
    spare_embeds: int,
    sharing: Sharing,
) -> list[RequestView]:
    """Drop victims that later, larger ones made unnecessary, dearest first (spare: at most 0)."""
    kept: list[RequestView] = []
    for request in reversed(victims):
        freed, embeds = sharing.freed_by(request), request.num_kept_embeds
        if freed <= -spare_blocks and spare_slots < 0 and embeds <= -spare_embeds:
            spare_blocks += freed
            spare_slots += 1
            spare_embeds += embeds
        else:
            kept.append(request)
    return kept[::-1]
