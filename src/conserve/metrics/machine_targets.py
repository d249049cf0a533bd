"""Targets where the operator names none: from what the machine does for chat alone."""

from __future__ import annotations

from dataclasses import dataclass

from conserve.core.latency import LatencyModel, StepShape
from conserve.core.snapshot import Targets

NUM_CHATS = 16
"""Chats that a busy server has under way at once."""
CHAT_TOKENS = 1024
"""Of a typical prompt, and behind each of those chats."""
SHORT_TOKENS = 16
"""Of a prompt that every profile has timed."""
NUM_STEPS = 4
"""A gap between tokens may be as long as so many steps of chats alone."""
NUM_PROMPTS = 2
"""A first token may wait for one prompt before its own."""
LEAST_TBT_S = 0.075
"""Thirteen tokens a second are twice as fast as people read: nobody needs a shorter gap."""
LEAST_TTFT_S = 0.5
"""Half of the second after which people notice that they wait."""
ROUND = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.5, 10.0)
"""Targets are said and remembered: one of these times a power of ten, the next above."""


@dataclass(frozen=True, slots=True)
class ChosenTargets:
    """Targets, and in a few words each where they come from."""

    targets: Targets
    ttft_reason: str
    tbt_reason: str


def choose_targets(
    model: LatencyModel | None, ttft_s: float = 0.0, tbt_s: float = 0.0, offline_floor: float = 0.0
) -> ChosenTargets:
    """The targets that are named; those that are 0 come from the machine. `model`: of its step
    times, None where nobody has measured it."""
    found_tbt_s, tbt_reason = (tbt_s, "as asked for") if tbt_s else _tbt(model)
    found_ttft_s, ttft_reason = (ttft_s, "as asked for") if ttft_s else _ttft(model, found_tbt_s)
    targets = Targets(found_ttft_s, found_tbt_s, offline_floor)
    return ChosenTargets(targets, ttft_reason, tbt_reason)


def _tbt(model: LatencyModel | None) -> tuple[float, str]:
    if model is None:
        return Targets().tbt_s, "by default: the machine has not been measured"
    chats = StepShape(NUM_CHATS, 0.0, NUM_CHATS, NUM_CHATS * CHAT_TOKENS)
    step_s = model.predict_s(chats) * (1 + model.margin)
    steps = f"{NUM_STEPS} steps of {NUM_CHATS} chats alone, of {_ms(step_s)} each"
    if NUM_STEPS * step_s < LEAST_TBT_S:
        return LEAST_TBT_S, f"from the machine: more than {steps}, and faster than people read"
    return rounded_up(NUM_STEPS * step_s), f"from the machine: {steps}"


def _ttft(model: LatencyModel | None, tbt_s: float) -> tuple[float, str]:
    if model is None:
        return Targets().ttft_s, "by default: the machine has not been measured"
    prompt_s = _prompt_s(model) * (1 + model.margin)
    least_s = NUM_PROMPTS * prompt_s + tbt_s
    parts = (
        f"{NUM_PROMPTS} prompts of {CHAT_TOKENS:,} tokens alone, of {_ms(prompt_s)} each, "
        "and one gap between tokens"
    )
    if least_s < LEAST_TTFT_S:
        return LEAST_TTFT_S, f"from the machine: more than {parts}, and too short to be noticed"
    return rounded_up(least_s), f"from the machine: {parts}"


def _prompt_s(model: LatencyModel) -> float:
    """A typical prompt takes no longer a token than a short one. A profile that is cut off with
    short ones knows little of attention, and may put all that disturbed it down to that."""
    by_token_s = model.predict_prefill_s(SHORT_TOKENS) / SHORT_TOKENS
    return min(model.predict_prefill_s(CHAT_TOKENS), CHAT_TOKENS * by_token_s)


def rounded_up(seconds: float) -> float:
    """The next round number, at most half as much above."""
    unit = 1e-3
    while 10 * unit < seconds:
        unit *= 10
    return next((round(unit * each, 6) for each in ROUND if unit * each >= seconds), 10 * unit)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
