"""What a step may hold beside tokens, blocks and slots: LoRA adapters, and what is encoded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from conserve.core.snapshot import Media, RequestView, Snapshot

PASS_S = 10.0
"""A request that waits for an adapter is passed by those who arrived less than this later, and by
no others who need one: they compute in one step with others of their adapter, and it does not wait
for ever."""


class Resources:
    """Counts what is left of them while a step is built."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._max_adapters = snapshot.capacity.max_adapters
        self._adapters: set[int] = set()
        self._step_embeds = snapshot.capacity.max_step_embeds
        self._free_embeds = snapshot.capacity.num_free_embeds
        self._kept_step_embeds = self._kept_free_embeds = 0
        """What is kept for a medium from those behind it."""
        self.limits_adapters = self._max_adapters is not None

    # Adapters

    def claim(self, requests: Iterable[RequestView]) -> None:
        """The step is for the adapters of these, first to last, while it has room for more."""
        if not self.limits_adapters:
            return
        for request in requests:
            left = request.num_tokens - request.num_computed_tokens
            if request.adapter and left > 0 and self.has_adapter(request):
                self._adapters.add(request.adapter)

    def forget_claims(self) -> None:
        """Whom the step was for cannot compute, for want of something else: it is anybody's."""
        self._adapters.clear()
        self._step_embeds += self._kept_step_embeds
        self._free_embeds += self._kept_free_embeds
        self._kept_step_embeds = self._kept_free_embeds = 0

    def has_adapter(self, request: RequestView) -> bool:
        """Whether it can compute in the step beside those that have theirs."""
        most = self._max_adapters
        if most is None or not request.adapter or request.adapter in self._adapters:
            return True
        return len(self._adapters) < most

    def line(self, waiting: Sequence[RequestView]) -> Sequence[RequestView]:
        """Those who have an adapter in the step if each who comes before them takes its own."""
        if not self.limits_adapters:
            return waiting
        before, passed_s = set(self._adapters), float("inf")
        allowed = []
        for request in waiting:
            if not self.has_adapter(request):
                passed_s = min(passed_s, request.arrival_s)
            elif not request.adapter or request.arrival_s < passed_s + PASS_S:
                allowed.append(request)
                self.claim([request])
        self._adapters = before
        return allowed

    # Media

    def fitting(self, request: RequestView, num_tokens: int) -> int:
        """How many of its next tokens it can compute: those before a medium that the encoder has no
        room for, which is kept from the media of those behind it."""
        if not self.has_adapter(request):
            return 0
        step, free = self._step_embeds, self._free_embeds
        for medium in media_in(request, num_tokens):
            step -= medium.num_to_compute
            free -= medium.num_embeds
            if step < 0 or free < 0:
                self._keep()
                return max(0, medium.first - request.num_computed_tokens)
        return num_tokens

    def _keep(self) -> None:
        kept = max(0, self._free_embeds)
        self._kept_step_embeds += self._step_embeds
        self._kept_free_embeds += kept
        self._step_embeds, self._free_embeds = 0, self._free_embeds - kept

    def take(self, request: RequestView, num_tokens: int) -> None:
        """It computes so many tokens in the step."""
        self.claim((request,))
        for medium in media_in(request, num_tokens):
            self._step_embeds -= medium.num_to_compute
            self._free_embeds -= medium.num_embeds

    def lacking_embeds(
        self, requests: Iterable[RequestView], num_tokens: int, freeable: int
    ) -> int:
        """What the encoder's cache lacks so that these, first to last, have the next medium within
        so many tokens, as far as one step can compute them and `freeable` embeddings suffice."""
        free, step = self._free_embeds, self._step_embeds
        for request in requests:
            for medium in media_in(request, num_tokens)[:1]:
                step -= medium.num_to_compute
                if step < 0 or free + freeable < medium.num_embeds:
                    return max(0, -free)
                free -= medium.num_embeds
        return max(0, -free)

    def release(self, request: RequestView) -> None:
        """It leaves, and with it what the encoder's cache keeps for it."""
        self._free_embeds += request.num_kept_embeds


def media_in(request: RequestView, num_tokens: int) -> Sequence[Media]:
    """Those that its next tokens touch and that the encoder's cache does not keep yet."""
    first = request.num_computed_tokens
    return [m for m in request.media if m.first < first + num_tokens and first < m.end]
