"""Where the server stands on the curve, and whether offline work starves."""

from __future__ import annotations

from conserve.server.dashboard.messages import Standing, Starving
from conserve.server.dashboard.spans import span
from conserve.server.series import Change, Reading

LONG_WAIT_S = 1800.0
"""Offline work that has got nothing for so long is said to starve; the alerts say so as well."""


def standing(minute: Change | None) -> Standing:
    """As metrics.md has it: quotients of what was counted."""
    if minute is None:
        return Standing("", None, None)
    alone_s = minute.total("chat_alone_seconds_total")
    bound = minute.total("bound_tokens_total")
    done = minute.total("computed_tokens_total", "offline")
    done -= minute.total("recomputed_tokens_total", "offline")
    slowdown = minute.total("chat_seconds_total") / alone_s if alone_s else None
    share = max(0.0, done) / bound if bound else None
    parts = [f"chat {slowdown:.1f}x of alone"] if slowdown is not None else []
    if share is not None:
        parts.append(f"harvest {100 * share:.0f} % of what first come first served would do")
    return Standing(", ".join(parts), slowdown, share)


def starving(reading: Reading) -> Starving:
    request_s = reading.get("oldest_offline_wait_seconds")
    batch_s = reading.get("batch_oldest_wait_seconds")
    parts = []
    if (request_s or 0.0) >= LONG_WAIT_S:
        parts.append(f"a request has been without a token for {span(request_s or 0.0)}")
    if (batch_s or 0.0) >= LONG_WAIT_S:
        parts.append(f"no line of a batch has ended for {span(batch_s or 0.0)}")
    text = f"Offline work starves: {' and '.join(parts)}." if parts else ""
    return Starving(text, request_s, batch_s)
