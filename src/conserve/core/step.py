"""One step under construction: what is granted so far, and what is left of it."""

from __future__ import annotations

from collections.abc import Iterable

from conserve.core.displacement import blocks_for
from conserve.core.latency import LatencyModel, StepShape
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import RequestView, Snapshot

UNLIMITED = float("inf")


class StepBuilder:
    """Grants tokens and counts what they take: tokens, blocks, slots, predicted time."""

    def __init__(self, snapshot: Snapshot, model: LatencyModel, settings: PolicySettings) -> None:
        self.snapshot = snapshot
        self.model = model
        self.settings = settings
        self.shape = StepShape()
        self.grants: dict[str, int] = {}
        self.tokens_left = snapshot.max_step_tokens
        if settings.fixed_step_tokens:
            self.tokens_left = min(self.tokens_left, settings.fixed_step_tokens)
        self.blocks_left = snapshot.num_free_blocks
        self.slots_left = snapshot.num_free_slots
        self.displaced: dict[str, RequestView] = {}
        self.restores: dict[str, int] = {}
        self.online_decodes: list[RequestView] = []
        self.online_prefills: list[RequestView] = []
        self.offline_decodes: list[RequestView] = []
        self.offline_prefills: list[RequestView] = []
        self.held = [r for r in snapshot.waiting_offline if r.num_blocks]
        """Waiting offline requests whose KV has been brought back into blocks."""
        self._sort_running()

    def _sort_running(self) -> None:
        width = self.snapshot.decode_width
        for request in self.snapshot.running:
            # A prompt whose last token is all that is left still owes its first token.
            decodes = (
                request.last_token_s is not None
                and request.num_tokens - request.num_computed_tokens <= width
            )
            if request.online:
                (self.online_decodes if decodes else self.online_prefills).append(request)
            else:
                (self.offline_decodes if decodes else self.offline_prefills).append(request)

    # Tokens, blocks and slots

    def _has(self, request: RequestView) -> bool:
        return request.request_id in self.grants

    def _promised_blocks(self, running: Iterable[RequestView]) -> int:
        """Blocks that running requests' known tokens lack yet: promised when they were admitted."""
        size, promised = self.snapshot.block_size, 0
        for request in running:
            lacking = -(-request.num_tokens // size) - request.num_blocks
            if lacking > 0:
                promised += lacking
        return promised

    def _lacking_blocks(self, request: RequestView) -> int:
        """Blocks a request needs beyond its own for all its known tokens."""
        return max(0, blocks_for(request.num_tokens, self.snapshot.block_size) - request.num_blocks)

    def _start(self, request: RequestView, reserve: int, limit_s: float, at_least: int = 0) -> int:
        """A waiting request's first chunk, if a slot, its blocks and `reserve` more are free."""
        need = self._lacking_blocks(request)
        if self.slots_left < 1 or need + reserve > self.blocks_left:
            return 0
        granted = self._grant_prefill(request, limit_s, at_least)
        if granted:
            self.slots_left -= 1
            self.blocks_left -= need
        return granted

    def _restore(self, request: RequestView, num_tokens: int, reserve: int) -> bool:
        """Bring a waiting request's checkpoint back, on the same terms as `_start`."""
        need = self._lacking_blocks(request)
        if self.slots_left < 1 or need + reserve > self.blocks_left:
            return False
        self.restores[request.request_id] = num_tokens
        self.slots_left -= 1
        self.blocks_left -= need
        return True

    def _yield(self, requests: Iterable[RequestView], *, slots: bool) -> None:
        """Offline requests give their blocks back, and their slots if they run."""
        for request in requests:
            self.displaced[request.request_id] = request
            self.blocks_left += request.num_blocks
            self.slots_left += slots

    def _grant_decodes(self, requests: Iterable[RequestView], limit_s: float) -> None:
        """One token each, up to the first that the limit or the budget has no room for.

        This loop is most of a decision's time: it keeps sums of its own, and predicts as
        `LatencyModel.predict_s` does, term by term.
        """
        shape, grants, displaced, left = self.shape, self.grants, self.displaced, self.tokens_left
        fixed_s, per_token, per_pair, per_decode, per_context = self.model.coefficients
        pairs_s, knee, factor = (
            per_pair * shape.attention_pairs,
            self.model.knee,
            1 + self.model.margin,
        )
        num, decodes, context = shape.num_tokens, shape.num_decodes, shape.decode_context
        bounded = limit_s < UNLIMITED
        for request in requests:
            computed = request.num_computed_tokens
            tokens = request.num_tokens - computed
            if tokens > left:
                break
            if tokens <= 0 or (displaced and request.request_id in displaced):
                continue
            if bounded:
                roof = num + tokens if num + tokens > knee else knee
                seconds = fixed_s + per_token * roof + pairs_s + per_decode * (decodes + 1)
                if (seconds + per_context * (context + computed)) * factor > limit_s:
                    break
            num += tokens
            decodes += 1
            context += computed
            left -= tokens
            grants[request.request_id] = tokens
        shape.num_tokens, shape.num_decodes, shape.decode_context = num, decodes, context
        self.tokens_left = left

    def _grant_prefill(self, request: RequestView, limit_s: float, at_least: int = 0) -> int:
        """Grant a chunk within the limit, or of `at_least` tokens past it; returns its size."""
        context = request.num_computed_tokens
        tokens = min(request.num_tokens - context, self.tokens_left)
        if limit_s < UNLIMITED and tokens > at_least:
            fitting = self.model.fitting_prefill_tokens(self.shape, context, limit_s)
            tokens = min(tokens, max(fitting, at_least))
        if tokens <= 0:
            return 0
        self.shape.add_prefill(tokens, context)
        self.grants[request.request_id] = tokens
        self.tokens_left -= tokens
        return tokens
