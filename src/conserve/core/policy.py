"""The policy: who computes how many tokens in the next step. Pure, one call a step."""

from __future__ import annotations

from collections.abc import Iterable

from conserve.core.displacement import blocks_for, choose_victims
from conserve.core.latency import LatencyModel, StepShape
from conserve.core.plan import Mode, Plan
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import RequestView, Snapshot
from conserve.core.stopping import best_step_tokens

UNLIMITED = float("inf")


def decide(snapshot: Snapshot, model: LatencyModel, settings: PolicySettings | None = None) -> Plan:
    """The plan for one step.

    Online requests get what they need, chunked so that resident online decodes keep their
    TBT target; offline requests fill what is left of the step up to a limit that depends on
    who is in it (`Mode`). Costs O(running + waiting online + head of the offline queue).
    """
    return _Step(snapshot, model, settings or PolicySettings()).plan()


class _Step:
    """One step under construction: what is granted so far, and what is left."""

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
        self.displaced: set[str] = set()
        self.online_decodes: list[RequestView] = []
        self.online_prefills: list[RequestView] = []
        self.offline_decodes: list[RequestView] = []
        self.offline_prefills: list[RequestView] = []
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

    def plan(self) -> Plan:
        tbt_limit_s = self._tbt_slack_s()
        self._grant_decodes(self.online_decodes, UNLIMITED)
        displaced = self._grant_online_prefills(tbt_limit_s)
        num_online = self.shape.num_tokens
        online_s = self.model.predict_s(self.shape)
        mode = self._mode()
        limit_s = self._offline_limit_s(mode, tbt_limit_s)
        self._grant_offline(limit_s, mode)
        if not self.shape.num_tokens:
            self._grant_least()
        within = self.shape.num_tokens
        self._grant_floor(online_s)
        if not self.shape.num_tokens:
            mode = Mode.IDLE
        return Plan(
            mode=mode,
            grants=self.grants,
            displace=[r.request_id for r in displaced],
            stoppable=self._stoppable(num_online),
            shape=self.shape,
            predicted_s=self.model.predict_s(self.shape),
            limit_s=limit_s,
            num_online_tokens=num_online,
            num_offline_tokens=self.shape.num_tokens - num_online,
            num_floor_tokens=self.shape.num_tokens - within,
        )

    # Online

    def _tbt_slack_s(self) -> float:
        """Time until the first resident online decode is due its next token."""
        last = [r.last_token_s for r in self.online_decodes if r.last_token_s is not None]
        if not last or self.settings.fixed_step_tokens:
            return UNLIMITED
        return min(last) + self.snapshot.targets.tbt_s - self.snapshot.now_s

    def _grant_online_prefills(self, tbt_limit_s: float) -> list[RequestView]:
        """Chunks for online prefills in order of arrival, and whom they displace."""
        floor = self.settings.min_chunk
        if not self.online_decodes:
            tbt_limit_s = UNLIMITED
        for request in self.online_prefills:
            floor -= self._grant_prefill(request, tbt_limit_s, at_least=floor)
        if not self.snapshot.waiting_online:
            return []
        promised = self._promised_blocks(self.online_decodes + self.online_prefills)
        displaced = self._displace(promised)
        for request in self.snapshot.waiting_online:
            granted = self._start(request, promised, tbt_limit_s, at_least=floor)
            floor -= granted
            if not granted:
                break
        return displaced

    def _displace(self, promised: int) -> list[RequestView]:
        """Make room for as many waiting online requests, first to last, as victims can serve."""
        waiting = self.snapshot.waiting_online
        if not self.settings.displacement:
            return []
        candidates = self.offline_decodes + self.offline_prefills
        size = self.snapshot.block_size
        needs = [blocks_for(r.num_tokens, size) for r in waiting]
        freeable = self.blocks_left + sum(r.num_blocks for r in candidates)
        num_served, total = 0, promised
        for need in needs[: self.slots_left + len(candidates)]:
            if total + need > freeable:
                break
            num_served, total = num_served + 1, total + need
        if not num_served:
            return []
        victims = choose_victims(candidates, total - self.blocks_left, num_served - self.slots_left)
        for request in victims:
            self.displaced.add(request.request_id)
            self.blocks_left += request.num_blocks
            self.slots_left += 1
        return victims

    # Offline

    def _mode(self) -> Mode:
        if self.online_prefills or self.snapshot.waiting_online:
            return Mode.ONLINE_PREFILL
        return Mode.ONLINE_DECODE if self.online_decodes else Mode.OFFLINE

    def _offline_limit_s(self, mode: Mode, tbt_limit_s: float) -> float:
        """Predicted time, margin included, that offline tokens may fill the step up to."""
        snapshot, settings = self.snapshot, self.settings
        if settings.fixed_step_tokens:
            return UNLIMITED
        if mode is Mode.ONLINE_PREFILL and self.shape.num_tokens:
            online_s = self.model.predict_s(self.shape) * (1 + self.model.margin)
            return min(tbt_limit_s, online_s * (1 + settings.prefill_stretch))
        if mode is Mode.ONLINE_DECODE:
            fill = max(settings.min_slack_fill, snapshot.online_residency)
            return tbt_limit_s * min(1.0, fill)
        if mode is Mode.OFFLINE and self._may_stop():
            return UNLIMITED
        # Also where an online request waits for blocks that only offline work can free.
        return snapshot.targets.ttft_s * settings.unstoppable_share

    def _grant_offline(self, limit_s: float, mode: Mode) -> None:
        """Decodes first (they finish requests and free memory), then prefill chunks in order."""
        if mode is Mode.OFFLINE and not self.settings.fixed_step_tokens:
            best = self._best_offline_tokens(may_stop=limit_s == UNLIMITED)
            self.tokens_left = min(self.tokens_left, best)
        decodes = self.offline_decodes
        if limit_s < UNLIMITED:
            # The limit may cut the list: whoever waited longest for a token goes first.
            decodes = sorted(decodes, key=lambda r: r.last_token_s or r.arrival_s)
        self._grant_decodes(decodes, limit_s)
        for request in self.offline_prefills:
            if not self.tokens_left:
                return
            if request.request_id not in self.displaced:
                self._grant_prefill(request, limit_s)
        if mode is not Mode.ONLINE_PREFILL:
            self._start_offline(limit_s)

    def _start_offline(self, limit_s: float) -> None:
        """Waiting offline requests in order, while each leaves a block for all that run."""
        if not self.tokens_left or not self.slots_left or not self.snapshot.waiting_offline:
            return
        num_running = len(self.offline_decodes) + len(self.offline_prefills)
        reserve = num_running + self._promised_blocks(self.snapshot.running)
        for request in self.snapshot.waiting_offline:
            if not self._has(request) and not self._start(request, reserve, limit_s):
                return

    def _grant_least(self) -> None:
        """One request's least progress, where the limit is shorter than any step (P0)."""
        least = self.settings.min_chunk
        for request in self.offline_decodes:
            self._grant_decodes([request], UNLIMITED)
            if self.grants:
                return
        for request in self.offline_prefills:
            if request.request_id not in self.displaced:
                self._grant_prefill(request, 0.0, at_least=least)
            if self.grants:
                return
        if not self.snapshot.waiting_online:
            reserve = self._promised_blocks(self.online_decodes + self.online_prefills)
            for request in self.snapshot.waiting_offline[:1]:
                self._start(request, reserve, 0.0, at_least=least)

    def _best_offline_tokens(self, may_stop: bool) -> int:
        """Step size that harvests most, given what a stop at the current rate throws away."""
        context = max((r.num_computed_tokens for r in self.offline_prefills), default=0)
        decode_context = sum(r.num_computed_tokens for r in self.offline_decodes)
        num_decodes = len(self.offline_decodes)
        decode_tokens = sum(r.num_tokens - r.num_computed_tokens for r in self.offline_decodes)
        rate = self.snapshot.interruption_rate if may_stop else 0.0

        def predict_s(num_tokens: int) -> float:
            chunk = max(0, num_tokens - decode_tokens)
            pairs = chunk * (context + chunk / 2)
            return self.model.predict_s(StepShape(num_tokens, pairs, num_decodes, decode_context))

        most = self.tokens_left
        least = min(most, max(decode_tokens, self.settings.min_chunk))
        return best_step_tokens(predict_s, rate, least, most)

    def _grant_floor(self, online_s: float) -> None:
        """Offline tokens beyond the limit, where the promised share of time is not reached."""
        floor = self.snapshot.targets.offline_floor
        if floor <= 0 or self.snapshot.offline_share >= floor or not online_s:
            return
        limit_s = online_s * (1 + self.model.margin) / (1 - floor)
        self._grant_decodes([r for r in self.offline_decodes if not self._has(r)], limit_s)
        for request in self.offline_prefills:
            if request.request_id not in self.displaced and not self._has(request):
                self._grant_prefill(request, limit_s)
        if all(self._has(r) for r in self.snapshot.waiting_online):
            self._start_offline(limit_s)

    def _may_stop(self) -> bool:
        """Whether the step can be stopped whichever offline requests it turns out to hold."""
        worn = self.settings.max_stops
        views = (*self.offline_decodes, *self.offline_prefills, *self.snapshot.waiting_offline)
        return self.snapshot.can_stop and all(r.num_stops < worn for r in views)

    def _stoppable(self, num_online: int) -> bool:
        if num_online or not self.shape.num_tokens or not self.snapshot.can_stop:
            return False
        worn = self.settings.max_stops
        views = (*self.snapshot.running, *self.snapshot.waiting_offline)
        return not any(r.num_stops >= worn for r in views if r.request_id in self.grants)

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

    def _start(self, request: RequestView, reserve: int, limit_s: float, at_least: int = 0) -> int:
        """A waiting request's first chunk, if a slot, its blocks and `reserve` more are free."""
        need = blocks_for(request.num_tokens, self.snapshot.block_size)
        if self.slots_left < 1 or need + reserve > self.blocks_left:
            return 0
        granted = self._grant_prefill(request, limit_s, at_least)
        if granted:
            self.slots_left -= 1
            self.blocks_left -= need
        return granted

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
