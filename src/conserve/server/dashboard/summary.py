"""The page's answers at one glance: is chat safe, and what is harvested?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conserve.server.dashboard.events import count
from conserve.server.dashboard.history import COARSE_S, RECENT_S, History
from conserve.server.series import Change, Latencies, Reading, merge

if TYPE_CHECKING:
    from conserve.server.dashboard.collector import Status

NO_FIGURES = (
    "This server exports no figures of ConServe's engine: it runs with --disable-log-stats, or "
    "without ConServe's --kv-transfer-config."
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What does not change while the server runs. Times in seconds."""

    model: str
    version: str
    ttft_target_s: float
    tbt_target_s: float
    started_s: float
    num_processes: int = 1
    """API processes; the figures cover all of them, the history is kept by each."""
    num_engines: int = 1
    has_figures: bool = True
    has_batches: bool = True
    needs_key: bool = False


def summarise(reading: Reading, history: History, facts: Facts, status: Status) -> dict[str, Any]:
    minute = _merged(history, RECENT_S)
    ten = _merged(history, COARSE_S)
    return {
        "time_s": reading.time_s,
        "server": _server(reading, ten, facts, status),
        "chat": _chat(minute, facts),
        "harvest": _harvest(reading, ten),
        "requests": {
            name: {
                "running": _int(reading.get("running_requests", name)),
                "waiting": _int(reading.get("waiting_requests", name)),
            }
            for name in ("online", "offline")
        },
        "memory": {
            "online_blocks": reading.get("kv_blocks", "online"),
            "offline_blocks": reading.get("kv_blocks", "offline"),
            "free_blocks": reading.get("kv_free_blocks"),
            "checkpoint_used_ratio": reading.get("checkpoint_used_ratio", "memory"),
        },
        "yields": _yields(reading),
        "latency_model_error": reading.get("latency_model_error_ratio"),
    }


def _merged(history: History, seconds: float) -> Change | None:
    recent = history.recent(seconds)
    return merge(recent) if recent else None


def _server(reading: Reading, ten: Change | None, facts: Facts, status: Status) -> dict[str, Any]:
    return {
        **dict(zip(("state", "text"), _state(reading, ten, facts, status), strict=True)),
        "uptime_s": reading.time_s - facts.started_s,
    }


def _state(reading: Reading, ten: Change | None, facts: Facts, status: Status) -> tuple[str, str]:
    if status.engine_dead():
        return "down", "The engine has stopped. The server ends, or serves nothing."
    if status.draining:
        return "draining", "Told to stop: finishing what runs, taking no more batch lines."
    if not facts.has_figures:
        return "blind", NO_FIGURES
    held = sum(
        reading.get(name, kind) or 0.0
        for name in ("running_requests", "waiting_requests")
        for kind in ("online", "offline")
    )
    came = ten is not None and any(ten.rate("requests_total", c) for c in ("online", "offline"))
    if held or came:
        return "serving", "Serving."
    if reading.get("requests_total", "online") or reading.get("requests_total", "offline"):
        return "idle", "Idle: nothing runs and nothing waits."
    return "ready", "Ready: nothing has come yet."


def _chat(minute: Change | None, facts: Facts) -> dict[str, Any]:
    figures: dict[str, Any] = {"requests": 0, "state": "quiet", "event": ""}
    parts = (("ttft", facts.ttft_target_s), ("tbt", facts.tbt_target_s))
    for short, target_s in parts:
        found = minute.latency(f"{short}_seconds") if minute else Latencies()
        for q in (50, 99):
            figures[f"{short}_p{q}_s"] = found.percentile_s(q)
        figures[f"{short}_within"] = found.share_within(target_s)
        figures[f"num_{short}"] = found.num_observed
    figures["requests"] = figures["num_ttft"]
    late = [short for short, target_s in parts if (figures[f"{short}_p99_s"] or 0.0) > target_s]
    if any(figures[f"num_{short}"] for short, _ in parts):
        figures["state"] = "late" if late else "safe"
    figures["text"], figures["detail"] = _verdict(figures, late)
    figures["event"] = _verdict_event(figures, late, facts)
    return figures


NAMES = {"ttft": "first tokens", "tbt": "gaps between tokens"}


def _verdict(figures: dict[str, Any], late: list[str]) -> tuple[str, str]:
    if figures["state"] == "quiet":
        return "No chat right now", "No chat request got a token in the last minute."
    seen = f"{count(figures['requests'], 'chat request')} in the last minute"
    if figures["state"] == "safe":
        return "Chat is safe", f"{seen}, P99 within both targets."
    what = " and ".join(NAMES[short] for short in late)
    return "Chat is late", f"{seen}; P99 of {what} is over its target."


def _verdict_event(figures: dict[str, Any], late: list[str], facts: Facts) -> str:
    if not late:
        return "Chat is within its targets again."
    targets = {"ttft": facts.ttft_target_s, "tbt": facts.tbt_target_s}
    parts = [
        f"P99 of {NAMES[short]} went over {targets[short]:g} s: {figures[f'{short}_p99_s']:.2f} s"
        for short in late
    ]
    return f"{'; '.join(parts)} over the last minute."


def _harvest(reading: Reading, ten: Change | None) -> dict[str, Any]:
    online, offline = (
        ten.rate("computed_tokens_total", kind) if ten else 0.0 for kind in ("online", "offline")
    )
    both = online + offline
    return {
        "offline_tps": offline,
        "online_tps": online,
        "offline_share": offline / both if both else None,
        "offline_tokens": reading.get("computed_tokens_total", "offline") or 0.0,
        "recomputed_tokens": reading.get("recomputed_tokens_total", "offline") or 0.0,
    }


def _yields(reading: Reading) -> dict[str, Any]:
    """Since the start of the server. Lost: displaced without a checkpoint."""
    keeps = reading.get("checkpoint_used_ratio", "memory") is not None
    displaced = reading.get("displaced_tokens_total")
    responses = reading.get("stop_response_seconds_count") or 0.0
    total_s = reading.get("stop_response_seconds_sum") or 0.0
    return {
        "stopped_steps": _int(reading.get("stopped_steps_total")),
        "dropped_tokens": _int(reading.get("dropped_tokens_total")),
        "displaced_requests": _int(reading.get("displaced_requests_total")),
        "displaced_tokens": _int(displaced),
        "lost_tokens": _int(displaced) - _int(reading.get("displaced_covered_tokens_total")),
        "restored_tokens": _int(reading.get("restored_tokens_total")) if keeps else None,
        "stop_response_mean_s": total_s / responses if responses else None,
    }


def _int(value: float | None) -> int:
    return round(value or 0.0)
