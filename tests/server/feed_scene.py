"""Messages of a feed in which everything is known: a server at work, and one batch."""

from __future__ import annotations

from conserve.batch.lifecycle import Status
from conserve.server.dashboard.messages import (
    COLUMNS,
    Batch,
    Batches,
    Bye,
    Chat,
    Counts,
    Event,
    Facts,
    Harvest,
    Held,
    Hello,
    LastEvents,
    Memory,
    Message,
    Point,
    Requests,
    Server,
    Standing,
    Starving,
    Summary,
    Tick,
    Yields,
)


def point(time_s: float, online_tps: float, offline_tps: float) -> Point:
    rest = dict.fromkeys(COLUMNS, 0.5)
    return Point(**{**rest, "time_s": time_s, "online_tps": online_tps, "offline_tps": offline_tps})


SUMMARY = Summary(
    time_s=1.0,
    server=Server("serving", "Serving.", uptime_s=3725),
    chat=Chat(
        state="safe",
        text="Chat is safe",
        detail="12 chat requests",
        event="Chat is within its targets again.",
        requests=12,
        ttft_p50_s=0.31,
        ttft_p99_s=1.04,
        ttft_within=0.9,
        num_ttft=12,
        tbt_p50_s=0.02,
        tbt_p99_s=None,
        tbt_within=None,
        num_tbt=0,
    ),
    harvest=Harvest(
        offline_tps=1314.2,
        online_tps=100.0,
        offline_share=0.93,
        offline_tokens=1e6,
        recomputed_tokens=200.0,
    ),
    standing=Standing(
        text="chat 1.2x of alone, harvest 91 % of what first come first served would do",
        chat_slowdown=1.2,
        harvest_share=0.91,
    ),
    starving=Starving(text="", request_wait_s=12.0, batch_wait_s=75.0),
    requests=Requests(online=Held(1, 0), offline=Held(24, 1200)),
    memory=Memory(
        online_blocks=10,
        offline_blocks=60,
        free_blocks=30,
        history_blocks=20,
        found_ratio=0.94,
        checkpoint_used_ratio=0.25,
    ),
    yields=Yields(
        stopped_steps=3,
        dropped_tokens=64,
        displaced_requests=1,
        displaced_tokens=700,
        lost_tokens=100,
        restored_tokens=500,
        stop_response_mean_s=0.01,
    ),
    latency_model_error=0.04,
)


def batch(name: str) -> Batch:
    return Batch(
        id="batch_1",
        endpoint="/v1/chat/completions",
        status=Status.IN_PROGRESS,
        is_ended=False,
        is_cancellable=True,
        is_paused=False,
        created_at=1,
        in_progress_at=2,
        expires_at=4_000_000_000,
        priority=10,
        deadline=None,
        deadline_state="on_track",
        progress=0.5,
        estimated_finish_at=None,
        request_counts=Counts(total=40, completed=20, failed=0),
        name=name,
        error=None,
        tokens=1234,
    )


def messages(batch_name: str) -> list[Message]:
    """From the first to the last. The second tick comes when everything else has been said."""
    facts = Facts("m", "0.0", ttft_target_s=1, tbt_target_s=0.2, started_s=0)
    return [
        Hello(facts, COLUMNS, fine=[point(0.0, 1.0, 900.0)], coarse=[]),
        Tick(SUMMARY, fine=[point(1.0, 50.0, 1000.0)], coarse=[]),
        LastEvents([Event(1.0, "yield", "Displaced 3 requests.")]),
        Batches(error=None, data=[batch(batch_name)], has_more=False),
        Tick(SUMMARY, fine=[point(2.0, 60.0, 500.0)], coarse=[]),
        Bye("The server is stopping."),
    ]
