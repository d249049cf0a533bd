"""How likely a silent conversation goes on, learned from how long others were silent."""

from __future__ import annotations

from conserve.core.latency import LatencyModel

NUM_SPANS = 14
"""Spans of silence: up to 1 s, up to 2 s, up to 4 s, ... and beyond 2^12 s."""
PRIOR_RETURN = 0.05
"""Share of silences that end in each span, before any has been seen."""
PRIOR_WEIGHT = 4.0
"""Silences that this belief counts for."""
MEMORY = 256
"""Silences after which half of what was learned is forgotten."""


def span_of(silent_s: float) -> int:
    """Number of the span in which a silence of so many seconds is; 0 is the first second."""
    return min(int(max(silent_s, 0.0)).bit_length(), NUM_SPANS - 1)


class Returns:
    """An estimate of survival (Kaplan and Meier): of the silences that reach a span, the share
    that end in it. A silence that is given up counts only in the spans that it reached."""

    def __init__(self) -> None:
        self._num_reached = [PRIOR_WEIGHT] * NUM_SPANS
        self._num_ended = [PRIOR_WEIGHT * PRIOR_RETURN] * NUM_SPANS
        self._chances = self._all_chances()

    def reached(self, span: int) -> None:
        """A silence goes on into `span`. To be said once of each span, in turn."""
        self._num_reached[span] += 1.0
        if span == 0 and self._num_reached[0] > MEMORY:
            self._num_reached = [count / 2 for count in self._num_reached]
            self._num_ended = [count / 2 for count in self._num_ended]
        self._chances = self._all_chances()

    def ended(self, span: int) -> None:
        """The conversation goes on, after a silence that had reached `span`."""
        self._num_ended[span] += 1.0
        self._chances = self._all_chances()

    def chance(self, silent_s: float = 0.0) -> float:
        """That a conversation which has been silent so long goes on at all, in [0, 1]."""
        return self._chances[span_of(silent_s)]

    def _all_chances(self) -> list[float]:
        chances, none_returns = [0.0] * NUM_SPANS, 1.0
        for span in reversed(range(NUM_SPANS)):
            ended, reached = self._num_ended[span], self._num_reached[span]
            none_returns *= 1 - min(ended / reached, 1.0)
            chances[span] = 1 - none_returns
        return chances


def worth_copying(chance: float, model: LatencyModel, tokens_per_s: float) -> bool:
    """Whether a token's KV is expected to save more seconds of computing than its copy takes of
    the link, which carries `tokens_per_s`."""
    return chance * model.full_token_s * tokens_per_s > 1.0
