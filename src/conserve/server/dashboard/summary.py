"""The page's answers at one glance: is chat safe, and what is harvested?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conserve.server.dashboard.events import count
from conserve.server.dashboard.history import COARSE_S, RECENT_S, History
from conserve.server.dashboard.messages import (
    Chat,
    ChatState,
    Facts,
    Harvest,
    Held,
    Memory,
    Requests,
    Server,
    ServerState,
    Summary,
    Yields,
)
from conserve.server.dashboard.standing import standing, starving
from conserve.server.dashboard.status import Status
from conserve.server.series import CLASSES, Change, Latencies, Reading, merge

NO_FIGURES = (
    "This server exports no figures of ConServe's engine: it runs with --disable-log-stats, or "
    "without ConServe's --kv-transfer-config."
)


def summarise(reading: Reading, history: History, facts: Facts, status: Status) -> Summary:
    minute = _merged(history, RECENT_S)
    ten = _merged(history, COARSE_S)
    state, text = _state(reading, ten, facts, status)
    return Summary(
        time_s=reading.time_s,
        server=Server(state, text, uptime_s=reading.time_s - facts.started_s),
        chat=_chat(minute, facts),
        harvest=_harvest(reading, ten),
        standing=standing(minute),
        starving=starving(reading),
        requests=Requests(online=_held(reading, "online"), offline=_held(reading, "offline")),
        memory=Memory(
            online_blocks=reading.get("kv_blocks", "online"),
            offline_blocks=reading.get("kv_blocks", "offline"),
            free_blocks=reading.get("kv_free_blocks"),
            history_blocks=reading.get("history_blocks"),
            found_ratio=_found_ratio(minute),
            checkpoint_used_ratio=reading.get("checkpoint_used_ratio", "memory"),
        ),
        yields=_yields(reading),
        latency_model_error=reading.get("latency_model_error_ratio"),
    )


def _merged(history: History, seconds: float) -> Change | None:
    recent = history.recent(seconds)
    return merge(recent) if recent else None


def _held(reading: Reading, name: str) -> Held:
    return Held(
        running=_int(reading.get("running_requests", name)),
        waiting=_int(reading.get("waiting_requests", name)),
    )


def _state(
    reading: Reading, ten: Change | None, facts: Facts, status: Status
) -> tuple[ServerState, str]:
    if status.engine_dead():
        return "down", "The engine has stopped. The server ends, or serves nothing."
    if status.draining:
        return "draining", "Told to stop: finishing what runs, taking no more batch lines."
    if not facts.has_figures:
        return "blind", NO_FIGURES
    held = sum(
        reading.get(name, kind) or 0.0
        for name in ("running_requests", "waiting_requests")
        for kind in CLASSES
    )
    came = ten is not None and any(ten.rate("requests_total", c) for c in CLASSES)
    if held or came:
        return "serving", "Serving."
    if any(reading.get("requests_total", c) for c in CLASSES):
        return "idle", "Idle: nothing runs and nothing waits."
    return "ready", "Ready: nothing has come yet."


@dataclass(frozen=True, slots=True)
class _Aim:
    """One latency of chat beside its target."""

    what: str
    seen: Latencies
    target_s: float

    @property
    def p99_s(self) -> float | None:
        return self.seen.percentile_s(99)

    @property
    def is_late(self) -> bool:
        return (self.p99_s or 0.0) > self.target_s


def _chat(minute: Change | None, facts: Facts) -> Chat:
    first, gaps = (
        minute.latency(name) if minute else Latencies() for name in ("ttft_seconds", "tbt_seconds")
    )
    ttft = _Aim("first tokens", first, facts.ttft_target_s)
    tbt = _Aim("gaps between tokens", gaps, facts.tbt_target_s)
    late = [aim for aim in (ttft, tbt) if aim.is_late]
    state, text, detail = _verdict(first, gaps, late)
    return Chat(
        state=state,
        text=text,
        detail=detail,
        event=_verdict_event(late),
        requests=first.num_observed,
        ttft_p50_s=first.percentile_s(50),
        ttft_p99_s=ttft.p99_s,
        ttft_within=first.share_within(ttft.target_s),
        num_ttft=first.num_observed,
        tbt_p50_s=gaps.percentile_s(50),
        tbt_p99_s=tbt.p99_s,
        tbt_within=gaps.share_within(tbt.target_s),
        num_tbt=gaps.num_observed,
    )


def _verdict(first: Latencies, gaps: Latencies, late: Sequence[_Aim]) -> tuple[ChatState, str, str]:
    if not first.num_observed and not gaps.num_observed:
        return "quiet", "No chat right now", "No chat request got a token in the last minute."
    seen = f"{count(first.num_observed, 'chat request')} in the last minute"
    if not late:
        return "safe", "Chat is safe", f"{seen}, P99 within both targets."
    what = " and ".join(aim.what for aim in late)
    return "late", "Chat is late", f"{seen}; P99 of {what} is over its target."


def _verdict_event(late: Sequence[_Aim]) -> str:
    if not late:
        return "Chat is within its targets again."
    parts = [f"P99 of {aim.what} went over {aim.target_s:g} s: {aim.p99_s:.2f} s" for aim in late]
    return f"{'; '.join(parts)} over the last minute."


def _harvest(reading: Reading, ten: Change | None) -> Harvest:
    online, offline = (ten.rate("computed_tokens_total", c) if ten else 0.0 for c in CLASSES)
    both = online + offline
    return Harvest(
        offline_tps=offline,
        online_tps=online,
        offline_share=offline / both if both else None,
        offline_tokens=reading.get("computed_tokens_total", "offline") or 0.0,
        recomputed_tokens=reading.get("recomputed_tokens_total", "offline") or 0.0,
    )


def _found_ratio(minute: Change | None) -> float | None:
    asked = minute.total("prompt_tokens_total", "online") if minute else 0.0
    return minute.total("prefix_hit_tokens_total", "online") / asked if minute and asked else None


def _yields(reading: Reading) -> Yields:
    keeps = reading.get("checkpoint_used_ratio", "memory") is not None
    displaced = reading.get("displaced_tokens_total")
    responses = reading.get("stop_response_seconds_count") or 0.0
    total_s = reading.get("stop_response_seconds_sum") or 0.0
    return Yields(
        stopped_steps=_int(reading.get("stopped_steps_total")),
        dropped_tokens=_int(reading.get("dropped_tokens_total")),
        displaced_requests=_int(reading.get("displaced_requests_total")),
        displaced_tokens=_int(displaced),
        lost_tokens=_int(displaced) - _int(reading.get("displaced_covered_tokens_total")),
        restored_tokens=_int(reading.get("restored_tokens_total")) if keeps else None,
        stop_response_mean_s=total_s / responses if responses else None,
    )


def _int(value: float | None) -> int:
    return round(value or 0.0)
