"""How fast a machine serves beside the one that the scenarios were made on, as one number.

Pure: what is measured comes in, a number comes out.
"""

from __future__ import annotations

from dataclasses import dataclass

NUM_STREAMS = 16


@dataclass(frozen=True, slots=True)
class Speed:
    """What one server computes, in tokens a second: of one prompt, of one answer, and of
    NUM_STREAMS answers together."""

    prefill_tps: float
    stream_tps: float
    batch_tps: float

    def step_s(self, num_streams: int) -> float:
        """A decode step of so many answers."""
        one_s, full_s = 1 / self.stream_tps, NUM_STREAMS / self.batch_tps
        share = (num_streams - 1) / (NUM_STREAMS - 1)
        return one_s + max(full_s - one_s, 0.0) * share

    def summary_s(self) -> float:
        """What one of the scenarios' offline requests takes of the server."""
        return SUMMARY_PROMPT / self.prefill_tps + SUMMARY_TOKENS / self.batch_tps

    def __str__(self) -> str:
        return (
            f"{self.prefill_tps:,.0f} prompt tokens a second, {self.stream_tps:,.0f} output tokens "
            f"in one stream and {self.batch_tps:,.0f} in {NUM_STREAMS}"
        )


SUMMARY_PROMPT, SUMMARY_TOKENS = 900, 48
REFERENCE = Speed(prefill_tps=2400.0, stream_tps=65.0, batch_tps=550.0)
"""The default model on two cores with AVX-512 and bfloat16, where the scenarios were made."""

SAME = 1.25
"""A machine within this factor of the reference has scale 1: its results stand beside others."""
LEAST, MOST = 0.01, 20.0
"""A client in Python is no load for a machine that is faster yet."""


def scale_of(speed: Speed) -> float:
    """Summaries a second beside the reference's: two digits, 1 where they are about the same,
    within LEAST and MOST."""
    ratio = REFERENCE.summary_s() / speed.summary_s()
    if 1 / SAME <= ratio <= SAME:
        return 1.0
    return float(f"{min(max(ratio, LEAST), MOST):.2g}")
