"""How long chat waits between two tokens, and how long it would wait without offline work."""

from __future__ import annotations

from conserve.core.latency import LatencyModel, StepShape


class ChatGaps:
    """What chat's tokens take, and what they would take alone: by step, which gives a request one
    token or, where tokens are speculated, as many as were right, in one message."""

    def __init__(self) -> None:
        self._span_s = self._gaps = self._waited_s = self._prefill_s = self._varying_s = 0.0

    def fade(self, keep: float, since_s: float) -> None:
        self._span_s = self._span_s * keep + since_s
        self._gaps *= keep
        self._waited_s *= keep
        self._prefill_s *= keep
        self._varying_s *= keep

    def add(self, seconds: float, online: StepShape, model: LatencyModel, num_given: int) -> None:
        """A step of `seconds` with this online part, which gave `num_given` decodes their token."""
        self._waited_s += online.num_decodes * seconds
        self._gaps += num_given
        if num_given < online.num_decodes:
            return
        num_tokens = online.num_tokens - online.num_prefill_tokens
        decodes = StepShape(num_tokens, 0.0, online.num_decodes, online.decode_context)
        decoding_s = model.predict_s(decodes)
        self._prefill_s += model.predict_s(online) - decoding_s
        self._varying_s += online.num_decodes * max(0.0, decoding_s - model.least_s)

    def alone_s(self, model: LatencyModel) -> float:
        """What a gap between tokens would take on average if chat were alone.

            gap = least + varying * (gap / gap now) + prefill * gap

        A step's `least` is there whatever is in it. What its decodes add shrinks with their number,
        which is in proportion to how long they stay (Little's law). Prefills of others take their
        share of any time. Never more than the gap now.
        """
        now_s = self._waited_s / self._gaps
        share = self._prefill_s / self._span_s + self._varying_s / self._waited_s
        return min(now_s, model.least_s / (1.0 - share)) if share < 1.0 else now_s
