"""What a flex answer's `usage` says beyond vLLM's counts."""

from __future__ import annotations

DETAILS = {
    "prompt_tokens_details": "cached_tokens",
    "completion_tokens_details": "reasoning_tokens",
}


def complete(usage: object) -> None:
    """Add the counts that OpenAI always sends and vLLM leaves out where there is nothing to count:
    clients compute a flex answer's price with them, and fail on None."""
    if not isinstance(usage, dict):
        return
    for name, count in DETAILS.items():
        details = usage.get(name)
        if details is None:
            usage[name] = {count: 0}
        elif isinstance(details, dict) and details.get(count) is None:
            details[count] = 0
