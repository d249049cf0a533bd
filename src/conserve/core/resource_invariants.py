"""What every plan must satisfy of adapters and of the encoder's cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from conserve.core.invariant_case import Case, require
from conserve.core.resources import Resources, media_in
from conserve.core.snapshot import RequestView


def check_resources(case: Case) -> None:
    _check_adapters(case)
    _check_media(case)
    _check_online_first(case)


def _check_adapters(case: Case) -> None:
    """vLLM ends at a step with more of them."""
    most = case.snapshot.capacity.max_adapters
    adapters = {view.adapter for view in case.granted if view.adapter}
    require(most is None or len(adapters) <= most, f"{len(adapters)} adapters in a step")


def _check_media(case: Case) -> None:
    capacity, plan = case.snapshot.capacity, case.plan
    media = [m for v in case.granted for m in media_in(v, plan.grants[v.request_id])]
    num_computed = sum(medium.num_to_compute for medium in media)
    require(num_computed <= capacity.max_step_embeds, f"{num_computed} embeddings in a step")
    free = _free_embeds(case)
    need = sum(medium.num_embeds for medium in media)
    require(not media or need <= free, f"{need} embeddings into room for {free}")


def _check_online_first(case: Case) -> None:
    """Where no online request computes, the first that finds slot, blocks and room for its media
    starts: no adapter and no medium of an offline one is in its way."""
    snapshot = case.snapshot
    if any(view.online for view in snapshot.running):
        return
    for view in islice(snapshot.waiting_online, 1):
        fits = snapshot.num_free_slots > 0 and case.lacking(view) <= snapshot.num_free_blocks
        room = snapshot.capacity.num_free_embeds
        if case.settings.displacement:
            room += sum(other.num_kept_embeds for other in snapshot.running)
        for medium in media_in(view, snapshot.max_step_tokens)[:1]:
            fits &= medium.num_to_compute <= snapshot.capacity.max_step_embeds
            fits &= medium.num_embeds <= room
        left = view.num_tokens > view.num_computed_tokens
        starts = view.request_id in case.starts
        require(starts or not fits or not left, f"{view.request_id} waits behind offline work")


def arrivals(case: Case) -> Sequence[RequestView]:
    """The waiting online requests that have an adapter beside those who run, of whom those who
    decode come first."""
    resources = Resources(case.snapshot)
    online = [view for view in case.snapshot.running if view.online]
    resources.claim(sorted(online, key=case.decodes, reverse=True))
    return resources.line(case.snapshot.waiting_online)


def embeds_left(case: Case) -> int:
    """Room in the encoder's cache once the next media of online requests are in it, those that
    it has room for, first to last."""
    snapshot, free = case.snapshot, _free_embeds(case)
    prefills = [v for v in snapshot.running if v.online and not case.decodes(v)]
    for view in (*prefills, *arrivals(case)):
        for medium in media_in(view, snapshot.max_step_tokens)[:1]:
            free -= medium.num_embeds if medium.num_embeds <= free else 0
    return free


def _free_embeds(case: Case) -> int:
    """With what the displaced leave."""
    gone = [case.by_id[name] for name in case.plan.displace]
    return case.snapshot.capacity.num_free_embeds + sum(view.num_kept_embeds for view in gone)
