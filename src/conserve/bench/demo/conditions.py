"""What the demo ran under: the machine's speed, what was chosen for it, and who disturbed it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conserve.bench.demo.plan import DemoPlan
from conserve.bench.scale import Speed
from conserve.metrics.processors import NOTHING, Taken

NOTICED = 0.1
"""Of the processors: less is what an idle desktop takes for itself."""
DRIFT = 1.25
"""The machine's own speed differs by this much from one quiet second to the next."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """measuring, taken: what others took of the processors while the speed was measured, and in
    the two periods. gflops: how fast the machine multiplied matrices before the first server was
    started and after the second period; 0 where it is not known."""

    plan: DemoPlan
    speed: Speed
    measuring: Taken = NOTHING
    taken: tuple[Taken, Taken] = (NOTHING, NOTHING)
    gflops: tuple[float, float] = (0.0, 0.0)

    def scale_in_words(self) -> str:
        return f"scale {self.plan.scale:g}: {self.speed}"

    def fitting_in_words(self) -> str:
        """What the scale means for chats and targets."""
        plan = self.plan
        return (
            f"bursts of {plan.burst_size} chats, {plan.excerpt_words} words in and "
            f"{plan.chat_tokens} tokens out; targets {1000 * plan.ttft_target_s:,.0f} ms to the "
            f"first token, {1000 * plan.tbt_target_s:,.0f} ms between tokens"
        )

    def disturbance(self) -> str:
        """One sentence, empty where nothing was noticed."""
        parts = []
        spans = (self.measuring, *self.taken)
        if max(span.share for span in spans) >= NOTICED:
            measuring, alone, together = (f"{span.share:.0%}" for span in spans)
            parts.append(
                f"{_who(spans)} took {measuring} of the processors while the speed was measured, "
                f"{alone} while chat was alone, {together} beside summaries"
            )
        before, after = self.gflops
        if before and after and max(before, after) > DRIFT * min(before, after):
            parts.append(
                f"the machine itself computed {before:.0f} GFLOP/s before and {after:.0f} after"
            )
        return f"Disturbed: {'; '.join(parts)}." if parts else ""

    def as_json(self) -> dict[str, object]:
        """For figures.json; pairs are of the two periods, or before and after both."""
        return {
            "scale": self.plan.scale,
            "speed": {
                "prefill_tps": round(self.speed.prefill_tps, 1),
                "stream_tps": round(self.speed.stream_tps, 1),
                "batch_tps": round(self.speed.batch_tps, 1),
            },
            "targets": {"ttft_s": self.plan.ttft_target_s, "tbt_s": self.plan.tbt_target_s},
            "taken_while_measuring": round(self.measuring.share, 3),
            "taken_by_others": [round(taken.share, 3) for taken in self.taken],
            "gflops": [round(value, 1) for value in self.gflops],
            "disturbance": self.disturbance(),
        }


def _who(taken: Sequence[Taken]) -> str:
    by_host = sum(t.stolen for t in taken) > sum(t.others for t in taken)
    return "other guests of the host" if by_host else "other programs"
