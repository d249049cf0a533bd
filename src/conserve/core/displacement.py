"""Which running offline requests make room for waiting online ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from conserve.core.snapshot import RequestView


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
    candidates: Sequence[RequestView], num_blocks: int, num_slots: int
) -> list[RequestView]:
    """Offline requests to displace so that `num_blocks` more blocks and `num_slots` slots are free.

    Cheapest first: what would have to be computed again is smallest (the checkpoint covers
    the rest), then the farthest deadline, then the latest arrival. Stops as soon as enough
    is free, and spares whomever a later, larger victim made needless. Where all candidates
    together are not enough, none goes.
    """
    if num_blocks <= 0 and num_slots <= 0:
        return []
    order = sorted(candidates, key=victim_order)
    if sum(r.num_blocks for r in order) < num_blocks or len(order) < num_slots:
        return []
    victims: list[RequestView] = []
    for request in order:
        if num_blocks <= 0 and num_slots <= 0:
            break
        if num_slots <= 0 and not request.num_blocks:
            continue
        victims.append(request)
        num_blocks -= request.num_blocks
        num_slots -= 1
    return _without_needless(victims, num_blocks, num_slots)


def _without_needless(
    victims: list[RequestView], spare_blocks: int, spare_slots: int
) -> list[RequestView]:
    """Drop victims that later, larger ones made unnecessary, dearest first (spare: at most 0)."""
    kept: list[RequestView] = []
    for request in reversed(victims):
        if request.num_blocks <= -spare_blocks and spare_slots < 0:
            spare_blocks += request.num_blocks
            spare_slots += 1
        else:
            kept.append(request)
    return kept[::-1]
