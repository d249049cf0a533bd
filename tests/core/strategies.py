"""Random models, requests and snapshots, no stranger than an engine could hand them over."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from conserve.core.blocks import blocks_for
from conserve.core.latency import LatencyModel, StepShape
from conserve.core.resources import media_in
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import Capacity, Media, RequestView, Sharing, Snapshot, Targets

NOW_S = 100.0


def models() -> st.SearchStrategy[LatencyModel]:
    """From a small accelerator to a slow CPU, any term but the first two possibly absent."""
    return st.builds(
        LatencyModel,
        fixed=st.floats(1e-4, 0.2),
        per_token=st.floats(1e-7, 1e-3),
        per_pair=st.just(0.0) | st.floats(1e-12, 1e-6),
        per_decode=st.just(0.0) | st.floats(1e-7, 1e-4),
        per_context=st.just(0.0) | st.floats(1e-10, 1e-6),
        knee=st.sampled_from([0.0, 64.0, 256.0]),
        per_activation=st.just(0.0) | st.floats(1e-8, 1e-4),
        margin=st.sampled_from([0.0, 0.02, 0.2]),
    )


@st.composite
def shapes(draw: DrawFn, max_requests: int = 4) -> StepShape:
    shape = StepShape()
    for _ in range(draw(st.integers(0, max_requests))):
        shape.add_prefill(draw(st.integers(1, 1024)), draw(st.integers(0, 8192)))
    for _ in range(draw(st.integers(0, max_requests))):
        shape.add_decode(1, draw(st.integers(1, 8192)))
    return shape


def settings() -> st.SearchStrategy[PolicySettings]:
    return st.builds(
        PolicySettings,
        prefill_stretch=st.sampled_from([0.0, 0.05, 1.0]),
        min_slack_fill=st.sampled_from([0.0, 0.35, 1.0]),
        unstoppable_share=st.sampled_from([0.0, 0.1, 1.0]),
        stop_gap_share=st.sampled_from([0.0, 0.1, 1.0]),
        max_stops=st.integers(0, 3),
        min_chunk=st.sampled_from([1, 32]),
        fixed_step_tokens=st.sampled_from([0, 0, 0, 64]),
        displacement=st.sampled_from([True, True, False]),
    )


@st.composite
def running_requests(
    draw: DrawFn,
    request_id: str,
    block_size: int,
    decode_width: int,
    online: bool | None = None,
    most_left: int = 600,
) -> RequestView:
    if online is None:
        online = draw(st.booleans())
    arrival_s = draw(st.floats(0.0, NOW_S))
    computed = draw(st.integers(0, 600))
    started = computed > 0 and draw(st.booleans())
    if started:
        # A decode, one whose token is still in flight, or a restart after a displacement.
        most = max(decode_width, min(400, most_left))
        remaining = draw(st.integers(0, decode_width) | st.integers(decode_width, most))
    else:
        remaining = draw(st.integers(1, most_left))
    fewest = blocks_for(computed, block_size)
    most = blocks_for(computed + remaining, block_size)
    return RequestView(
        request_id,
        online,
        arrival_s,
        num_tokens=computed + remaining,
        num_computed_tokens=computed,
        num_blocks=draw(st.integers(fewest, most)),
        last_token_s=draw(st.floats(arrival_s, NOW_S)) if started else None,
        deadline_s=None if online else draw(st.none() | st.floats(NOW_S, 2 * NOW_S)),
        num_checkpointed_tokens=draw(st.just(0) | st.integers(0, computed)),
        num_stops=0 if online else draw(st.integers(0, 3)),
        ttft_target_s=draw(own_targets(online)),
        tbt_target_s=draw(own_targets(online)),
    )


def own_targets(online: bool) -> st.SearchStrategy[float | None]:
    return st.none() | st.sampled_from([1e-3, 0.1, 2.0, 1e4]) if online else st.none()


@st.composite
def waiting_requests(
    draw: DrawFn, request_id: str, online: bool, block_size: int = 16, most_tokens: int = 1200
) -> RequestView:
    arrival_s = draw(st.floats(0.0, NOW_S))
    num_tokens = draw(st.integers(1, most_tokens))
    # A prefix may lie in the cache already; at least one token is always computed.
    cached = draw(st.just(0) | st.integers(0, num_tokens - 1))
    held = 0 if online or not cached else draw(st.just(0) | st.just(blocks_for(cached, block_size)))
    return RequestView(
        request_id,
        online,
        arrival_s,
        num_tokens=num_tokens,
        num_computed_tokens=cached,
        num_blocks=held,
        num_borrowed_blocks=0 if held else draw(st.integers(0, cached // block_size)),
        num_checkpointed_tokens=draw(st.just(0) | st.integers(0, num_tokens)),
        num_stops=0 if online else draw(st.integers(0, 3)),
        ttft_target_s=draw(own_targets(online)),
        tbt_target_s=draw(own_targets(online)),
    )


@st.composite
def media(draw: DrawFn, view: RequestView) -> list[Media]:
    """A few images in what it has still to compute, one perhaps across its first token."""
    found: list[Media] = []
    at = max(0, view.num_computed_tokens - draw(st.integers(0, 8)))
    for _ in range(draw(st.integers(0, 3))):
        first = at + draw(st.integers(0, 200))
        end = first + draw(st.integers(1, 64))
        if end > view.num_tokens:
            break
        if end > view.num_computed_tokens:
            embeds = draw(st.integers(1, 64))
            found.append(Media(first, end, embeds, draw(st.sampled_from([0, embeds, embeds]))))
        at = end
    return found


@st.composite
def capacities(draw: DrawFn, views: list[RequestView], *, whole: bool) -> Capacity:
    """What the machine has of adapters and of its encoder; each of the views may need of it.
    `whole`: prompts cannot be cut before a medium; no such model has more of them than fit."""
    max_adapters = draw(st.sampled_from([None, None, 1, 2]))
    has_encoder = not whole and draw(st.sampled_from([False, False, True]))
    for view in views:
        if max_adapters:
            view.adapter = draw(st.integers(0, 3))
        if has_encoder:
            view.media = draw(media(view))
            # What is kept for it is what it computes next.
            reaches = view.num_tokens > view.num_computed_tokens and not media_in(view, 1)
            if view.request_id.startswith("run-") and reaches:
                view.num_kept_embeds = draw(st.just(0) | st.integers(1, 64))
    if not has_encoder:
        return Capacity(max_adapters)
    free = draw(st.integers(64, 256)) - sum(view.num_kept_embeds for view in views)
    return Capacity(max_adapters, draw(st.integers(64, 128)), max(0, free))


@st.composite
def sharings(
    draw: DrawFn, running: list[RequestView], waiting_online: list[RequestView]
) -> Sharing:
    """Some leading blocks of some offline requests, of which some are shared among them alone; and
    some that arrivals borrow last."""
    offline = [view for view in running if not view.online and view.num_blocks]
    sharers = [view for view in offline if draw(st.booleans())]
    shared = {view.request_id: draw(st.integers(1, view.num_blocks)) for view in sharers}
    # Each of those blocks is held twice or more.
    among = draw(st.integers(0, sum(shared.values()) // 2))
    borrowed = {view.request_id: view.num_borrowed_blocks for view in waiting_online}
    lasting = {name: draw(st.just(0) | st.integers(0, most)) for name, most in borrowed.items()}
    return Sharing(shared, among, lasting)


@st.composite
def snapshots(draw: DrawFn, max_requests: int = 4) -> Snapshot:
    block_size = draw(st.sampled_from([1, 4, 16]))
    width = draw(st.sampled_from([1, 1, 4]))
    lengths = st.integers(0, max_requests)
    # Who is there decides the mode, so each mode is drawn often.
    online = draw(st.sampled_from([None, None, False]))
    num_waiting_online = draw(lengths) if draw(st.booleans()) else 0
    max_step_tokens = draw(st.sampled_from([16, 256, 2048]))
    whole = draw(st.sampled_from([False, False, True]))
    # No engine that computes prompts whole takes one that is longer than a step.
    left, length = (min(n, max_step_tokens) if whole else n for n in (600, 1200))
    running = [
        draw(running_requests(f"run-{i}", block_size, width, online, left))
        for i in range(draw(lengths))
    ]
    waiting_online = [
        draw(waiting_requests(f"on-{i}", True, block_size, length))
        for i in range(num_waiting_online)
    ]
    waiting_offline = [
        draw(waiting_requests(f"off-{i}", False, block_size, length)) for i in range(draw(lengths))
    ]
    return Snapshot(
        now_s=NOW_S,
        running=running,
        capacity=draw(capacities([*running, *waiting_online, *waiting_offline], whole=whole)),
        sharing=draw(st.just(Sharing()) | sharings(running, waiting_online)),
        waiting_online=waiting_online,
        waiting_offline=waiting_offline,
        num_free_blocks=draw(st.integers(0, 400)),
        num_free_slots=draw(st.integers(0, 4)),
        block_size=block_size,
        max_step_tokens=max_step_tokens,
        whole_prompts=whole,
        targets=Targets(
            ttft_s=draw(st.sampled_from([0.05, 1.0])),
            tbt_s=draw(st.sampled_from([0.01, 0.2, 2.0])),
            offline_floor=draw(st.sampled_from([0.0, 0.0, 0.3])),
        ),
        decode_width=width,
        interruption_rate=draw(st.sampled_from([0.0, 0.1, 20.0])),
        online_residency=draw(st.floats(0.0, 1.0)),
        offline_share=draw(st.floats(0.0, 1.0)),
        can_stop=draw(st.booleans()),
        stop_gap_s=draw(st.sampled_from([0.0, 0.0, 0.007, 0.5])),
        copy_tokens=draw(st.sampled_from([0, 3, 64, 4096])),
        copy_tail=draw(st.sampled_from([1, block_size])),
        restore_tokens_per_s=draw(st.sampled_from([0.0, 100.0, 1e6])),
        restore_queue_s=draw(st.sampled_from([0.0, 0.5])),
        num_remembered_blocks=draw(st.just(0) | st.integers(0, 400)),
        copies_online=draw(st.booleans()),
        num_loading_online=draw(st.sampled_from([0, 0, 1])),
    )
