"""What first come first served would harvest: steps that are filled without regard for chat."""

from __future__ import annotations

from typing import NamedTuple

from conserve.core.latency import LatencyModel, StepShape


class Crowd(NamedTuple):
    """The offline requests in an engine, and what they leave free."""

    num_running: int = 0
    """Those that hold a slot."""
    num_blocks: int = 0
    """Blocks that those hold."""
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_free_slots: int = 0

    @property
    def would_run(self) -> float:
        """How many would hold a slot if those that wait started for as long as there is room: of
        memory, half a request's is left over on average."""
        if not self.num_blocks:
            return self.num_running
        by_memory = max(0.0, self.num_running * self.num_free_blocks / self.num_blocks - 0.5)
        return self.num_running + min(by_memory, self.num_free_slots, self.num_waiting)


class Work:
    """Sums of what steps computed of one class, which fade."""

    __slots__ = ("context", "decode_tokens", "decodes", "pairs", "tokens")

    def __init__(self) -> None:
        self.tokens = self.pairs = self.decodes = self.decode_tokens = self.context = 0.0

    def fade(self, keep: float) -> None:
        self.tokens *= keep
        self.decode_tokens *= keep
        self.pairs *= keep
        self.decodes *= keep
        self.context *= keep

    def add(self, shape: StepShape) -> None:
        self.tokens += shape.num_tokens
        self.decode_tokens += shape.num_tokens - shape.num_prefill_tokens
        self.pairs += shape.attention_pairs
        self.decodes += shape.num_decodes
        self.context += shape.decode_context

    def beside_tokens_s(self, model: LatencyModel) -> float:
        """What it takes by the model beyond `per_token`."""
        return (
            model.per_activation * self.tokens
            + model.per_pair * self.pairs
            + model.per_decode * self.decodes
            + model.per_context * self.context
        )


class Bound:
    """Told of the time in which offline requests are in the engine, and of what steps compute then.
    Its sums fade: what is told of late tells what would be."""

    def __init__(self) -> None:
        self._online, self._offline = Work(), Work()
        self._span_s = 0.0
        self._crowded_s = self._would_run_s = 0.0
        """How long some offline request ran; that time, for each that would have."""

    @property
    def knows_offline_work(self) -> bool:
        return self._offline.tokens > 0

    def passed(self, seconds: float, keep: float, crowd: Crowd) -> None:
        """`keep`: what is left of the sums of before."""
        self._online.fade(keep)
        self._offline.fade(keep)
        self._span_s = self._span_s * keep + seconds
        if crowd.num_running:
            self._crowded_s = self._crowded_s * keep + seconds
            self._would_run_s = self._would_run_s * keep + crowd.would_run * seconds

    def computed(self, online: StepShape, offline: StepShape) -> None:
        self._online.add(online)
        self._offline.add(offline)

    def tokens_per_s(self, model: LatencyModel, max_tokens: int) -> float:
        """Offline tokens a second of steps that are filled first come first served.

        The offline work is what it was of late: of its tokens a share d are those of decodes, w of
        each. N requests would run (`Crowd.would_run`). A step then has n tokens of their decodes
        and p of their prompts on average: n = w * N, or as many as leave room in `max_tokens` for
        p = n * (1 - d) / d and for the r * T online tokens that come meanwhile. Prompts come in
        steps that are full, between steps of decodes alone, which cost no less than the knee; so a
        step takes on average

            T = fixed + per_token * (k + (p + r * T) * (max_tokens - k) / (max_tokens - n)) + rest

        with k = max(n, knee), and the bound is (n + p) / T. 0 before there was any offline work,
        and where online work alone leaves no time.
        """
        off, on, span_s = self._offline, self._online, self._span_s
        if not off.tokens or not span_s:
            return 0.0
        rate, busy = on.tokens / span_s, on.beside_tokens_s(model) / span_s
        beside_s = off.beside_tokens_s(model) / off.tokens
        left = 1.0 - busy - model.per_token * rate
        if left <= 0:
            return 0.0
        taken = rate / left
        most = (max_tokens - taken * model.fixed) / (1.0 + taken * (model.per_token + beside_s))
        share = off.decode_tokens / off.tokens
        running = self._would_run_s / self._crowded_s if self._crowded_s else 0.0
        tokens = min(most, running * off.tokens / off.decodes) if off.decodes else most
        if tokens <= 0:
            return 0.0
        decodes = min(tokens * share, max_tokens - 1.0)
        flat = max(decodes, model.knee)
        slope = max(0.0, max_tokens - flat) / (max_tokens - decodes)
        busy_s = model.fixed + model.per_token * (flat + slope * (tokens - decodes))
        return tokens * (1.0 - busy - model.per_token * slope * rate) / (busy_s + tokens * beside_s)
