"""One step under construction: what is granted so far, and what is left of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from conserve.core.blocks import lacking_blocks
from conserve.core.latency import LatencyModel, StepShape
from conserve.core.resources import Resources
from conserve.core.snapshot import RequestView, Snapshot

UNLIMITED = float("inf")


class StepBuilder:
    """Grants tokens and counts what they take: tokens, blocks, slots, predicted time; in
    `resources` what else the machine has little of.

    Every limit is one of the step's whole predicted time, margin included, in seconds.
    """

    def __init__(self, snapshot: Snapshot, model: LatencyModel) -> None:
        self.shape = StepShape()
        self.grants: dict[str, int] = {}
        self.restores: dict[str, int] = {}
        self.displaced: dict[str, RequestView] = {}
        self.tokens_left = snapshot.max_step_tokens
        self.blocks_left = snapshot.num_free_blocks
        self.slots_left = snapshot.num_free_slots
        self.resources = Resources(snapshot)
        self._memory = snapshot.memory
        self._restore_blocks = snapshot.restore_blocks
        self._beside = snapshot.tokens_beside
        self._most_tokens = snapshot.max_step_tokens
        self._whole_prompts = snapshot.whole_prompts
        self._sharing = snapshot.sharing
        self._model = model

    def has(self, request: RequestView) -> bool:
        return request.request_id in self.grants

    def staying(self, requests: Sequence[RequestView]) -> Sequence[RequestView]:
        """Those of them that are not displaced."""
        if not self.displaced:
            return requests
        return [r for r in requests if r.request_id not in self.displaced]

    def grant_decodes(self, requests: Iterable[RequestView], limit_s: float) -> None:
        """One token each, in order, to those that have none yet and that fit the limit, while the
        budget lasts: one with a long context is no reason for others to wait.

        This loop is most of a decision's time: it keeps sums of its own, and predicts as
        `LatencyModel.predict_s` does, term by term.
        """
        if self.resources.limits_adapters:
            requests = self._with_adapters(requests)
        shape, grants, displaced, left = self.shape, self.grants, self.displaced, self.tokens_left
        fixed_s, per_token, per_pair, per_decode, per_context, per_activation = (
            self._model.coefficients
        )
        base_s, knee = fixed_s + per_pair * shape.attention_pairs, self._model.knee
        factor, bounded, beside = 1 + self._model.margin, limit_s < UNLIMITED, self._beside
        num, decodes, context = shape.num_tokens, shape.num_decodes, shape.decode_context
        for request in requests:
            computed = request.num_computed_tokens
            tokens = request.num_tokens - computed
            if tokens + beside > left:
                break
            if tokens <= 0 or request.request_id in grants:
                continue
            if displaced and request.request_id in displaced:
                continue
            if bounded:
                roof = num + tokens if num + tokens > knee else knee
                seconds = base_s + per_token * roof + per_decode * (decodes + 1)
                seconds += per_context * (context + computed) + per_activation * (num + tokens)
                if seconds * factor > limit_s:
                    continue
            num += tokens
            decodes += 1
            context += computed
            left -= tokens + beside
            grants[request.request_id] = tokens
        shape.num_tokens, shape.num_decodes, shape.decode_context = num, decodes, context
        self.tokens_left = left

    def grant_first_decode(self, requests: Iterable[RequestView], limit_s: float) -> None:
        """To the first of them that fits the limit."""
        self.grant_decodes(self._until_granted(requests), limit_s)

    def _until_granted(self, requests: Iterable[RequestView]) -> Iterator[RequestView]:
        for request in requests:
            yield request
            if self.has(request):
                return

    def _with_adapters(self, requests: Iterable[RequestView]) -> Iterator[RequestView]:
        for request in requests:
            if self.resources.has_adapter(request):
                yield request
                if self.has(request):
                    self.resources.claim((request,))

    def grant_prefill(self, request: RequestView, limit_s: float, at_least: int = 0) -> int:
        """Grant a chunk within the limit, or of `at_least` tokens past it; returns its size. A
        prompt that cannot be cut is granted whole on the same terms, or not at all."""
        context = request.num_computed_tokens
        left = request.num_tokens - context
        ahead = left if self._whole_prompts else min(left, self.tokens_left - self._beside)
        tokens = self.resources.fitting(request, ahead)
        if self._whole_prompts:
            tokens = self._whole(left, context, limit_s, at_least) if tokens == left else 0
        elif limit_s < UNLIMITED and tokens > at_least:
            fitting = self._model.fitting_prefill_tokens(self.shape, context, limit_s)
            tokens = min(tokens, max(fitting, at_least))
        if tokens <= 0:
            return 0
        self.shape.add_prefill(tokens, context)
        self.resources.take(request, tokens)
        self.grants[request.request_id] = tokens
        self.tokens_left -= tokens + self._beside
        return tokens

    def _whole(self, num_tokens: int, context: int, limit_s: float, at_least: int) -> int:
        """`num_tokens` or 0. Where anything at all is granted past the limits, all of it is, as far
        as the engine's own budget goes: what was planned to be left over is no reason to wait."""
        if at_least > 0:
            return num_tokens if num_tokens <= self._most_tokens - self.shape.num_tokens else 0
        if num_tokens > self.tokens_left:
            return 0
        if limit_s == UNLIMITED:
            return num_tokens
        fitting = self._model.fitting_prefill_tokens(self.shape, context, limit_s)
        return num_tokens if fitting >= num_tokens else 0

    def start(self, request: RequestView, reserve: int, limit_s: float, at_least: int = 0) -> int:
        """A waiting request's first chunk, if a slot, its blocks and `reserve` more are free;
        returns its size."""
        need = lacking_blocks(request, self._memory)
        if self.slots_left < 1 or need + reserve > self.blocks_left:
            return 0
        granted = self.grant_prefill(request, limit_s, at_least)
        if granted:
            self.slots_left -= 1
            self.blocks_left -= need
        return granted

    def restore(self, request: RequestView, num_tokens: int, reserve: int) -> bool:
        """Bring a waiting request's checkpoint back, on the same terms as `start`, with the blocks
        of its first step beside."""
        need = lacking_blocks(request, self._memory)
        if self.slots_left < 1 or need + reserve + self._restore_blocks > self.blocks_left:
            return False
        self.restores[request.request_id] = num_tokens
        self.slots_left -= 1
        self.blocks_left -= need
        return True

    def release(self, requests: Iterable[RequestView], *, slots: bool) -> None:
        """Offline requests give their blocks back, and their slots if they run."""
        for request in requests:
            self.displaced[request.request_id] = request
            self.blocks_left += self._sharing.freed_by(request)
            self.resources.release(request)
            self.slots_left += slots
