"""The policy: who computes how many tokens in the next step. Pure, one call a step."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from conserve.core.checkpointing import choose_copies, tokens_to_restore
from conserve.core.displacement import choose_victims
from conserve.core.latency import LatencyModel, StepShape
from conserve.core.plan import Mode, Plan
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import RequestView, Snapshot
from conserve.core.step import UNLIMITED, StepBuilder
from conserve.core.stopping import best_step_tokens


def decide(snapshot: Snapshot, model: LatencyModel, settings: PolicySettings | None = None) -> Plan:
    """The plan for one step.

    Online requests get what they need, chunked so that resident online decodes keep their
    TBT target; offline requests fill what is left of the step up to a limit that depends on
    who is in it (`Mode`). Costs O(running + waiting online + head of the offline queue).
    """
    return _Step(snapshot, model, settings or PolicySettings()).plan()


class _Step(StepBuilder):
    """The decisions, in the order in which they are taken."""

    def plan(self) -> Plan:
        tbt_limit_s = self._tbt_slack_s()
        self._grant_decodes(self.online_decodes, UNLIMITED)
        self._grant_online_prefills(tbt_limit_s)
        if self.held:
            staying = [r for r in self.snapshot.running if r.request_id not in self.displaced]
            self._yield_held(self._promised_blocks(staying) - self.blocks_left)
        online_shape = replace(self.shape)
        num_online = online_shape.num_tokens
        online_s = self.model.predict_s(online_shape)
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
            displace=list(self.displaced),
            checkpoint=self._copies(),
            restore=self.restores,
            stoppable=self._stoppable(mode, num_online),
            online_shape=online_shape,
            due_s=self.snapshot.now_s + tbt_limit_s,
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

    def _grant_online_prefills(self, tbt_limit_s: float) -> None:
        """Chunks for online prefills in order of arrival; they may displace offline requests."""
        floor = self.settings.min_chunk
        if not self.online_decodes:
            tbt_limit_s = UNLIMITED
        for request in self.online_prefills:
            floor -= self._grant_prefill(request, tbt_limit_s, at_least=floor)
        if not self.snapshot.waiting_online:
            return
        promised = self._promised_blocks(self.online_decodes + self.online_prefills)
        self._displace(promised)
        for request in self.snapshot.waiting_online:
            granted = self._start(request, promised, tbt_limit_s, at_least=floor)
            floor -= granted
            if not granted:
                break

    def _displace(self, promised: int) -> None:
        """Make room for as many waiting online requests, first to last, as victims can serve."""
        if not self.settings.displacement:
            return
        candidates = self.offline_decodes + self.offline_prefills
        needs = [self._lacking_blocks(r) for r in self.snapshot.waiting_online]
        held = sum(r.num_blocks for r in self.held if r.request_id not in self.displaced)
        freeable = self.blocks_left + held + sum(r.num_blocks for r in candidates)
        num_served, total = 0, promised
        for need in needs[: self.slots_left + len(candidates)]:
            if total + need > freeable:
                break
            num_served, total = num_served + 1, total + need
        if not num_served:
            return
        lacking = total - self.blocks_left - held
        self._yield(choose_victims(candidates, lacking, num_served - self.slots_left), slots=True)
        self._yield_held(total - self.blocks_left)

    def _yield_held(self, num_blocks: int) -> None:
        """Requests that were brought back and do not run yet give up `num_blocks` first: what
        they hold lies on the host as well."""
        candidates = [r for r in self.held if r.request_id not in self.displaced]
        if num_blocks > 0 and sum(r.num_blocks for r in candidates) < num_blocks:
            self._yield(candidates, slots=False)
        else:
            self._yield(choose_victims(candidates, num_blocks, 0), slots=False)

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
            most = settings.stoppable_slack_fill if self._may_stop else 1.0
            return tbt_limit_s * min(most, fill)
        if mode is Mode.OFFLINE and self._may_stop:
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
                break
            if request.request_id not in self.displaced:
                self._grant_prefill(request, limit_s)
        if mode is not Mode.ONLINE_PREFILL:
            self._start_offline(limit_s)

    def _start_offline(self, limit_s: float) -> None:
        """Waiting offline requests in order, while each leaves a block for all that run. Those
        with a checkpoint worth bringing back begin with that, which takes no tokens."""
        if not self.slots_left or not self.snapshot.waiting_offline:
            return
        num_running = len(self.offline_decodes) + len(self.offline_prefills)
        reserve = num_running + self._promised_blocks(self.snapshot.running)
        for request in self.snapshot.waiting_offline:
            if self._has(request) or request.request_id in self.displaced:
                continue
            if num_tokens := self._num_restorable(request):
                if not self._restore(request, num_tokens, reserve):
                    return
            elif not self.tokens_left or not self._start(request, reserve, limit_s):
                return

    def _num_restorable(self, request: RequestView) -> int:
        if request.num_blocks or not request.num_checkpointed_tokens:
            return 0
        return tokens_to_restore(
            request,
            request.num_computed_tokens,
            self.model.predict_prefill_s,
            self.snapshot.restore_tokens_per_s,
            self.snapshot.restore_queue_s,
        )

    def _copies(self) -> dict[str, int]:
        """What running offline requests have computed before this step goes to the host."""
        snapshot = self.snapshot
        if not snapshot.copy_tokens:
            return {}
        staying = self.offline_decodes + self.offline_prefills
        if self.displaced:
            staying = [r for r in staying if r.request_id not in self.displaced]
        return choose_copies(staying, snapshot.copy_tokens, snapshot.block_size, snapshot.copy_tail)

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
        if not self.snapshot.waiting_online and not self.restores:
            reserve = self._promised_blocks(self.online_decodes + self.online_prefills)
            for request in self.snapshot.waiting_offline[:1]:
                if request.request_id in self.displaced:
                    return
                self._yield_to(request, self._lacking_blocks(request) + reserve)
                self._start(request, reserve, 0.0, at_least=least)

    def _yield_to(self, request: RequestView, num_blocks: int) -> None:
        """Requests that were brought back too many give way to the first of them."""
        if self.slots_left < 1 or request.num_tokens <= request.num_computed_tokens:
            return
        others = [r for r in self.held if r is not request and r.request_id not in self.displaced]
        self._yield(choose_victims(others, num_blocks - self.blocks_left, 0), slots=False)

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

    @cached_property
    def _may_stop(self) -> bool:
        """Whether the step can be stopped whichever requests it turns out to hold."""
        worn = self.settings.max_stops
        views = (*self.snapshot.running, *self.snapshot.waiting_offline)
        return self.snapshot.can_stop and all(r.num_stops < worn for r in views)

    def _stoppable(self, mode: Mode, num_online: int) -> bool:
        if self.shape.num_tokens == num_online or not self.snapshot.can_stop:
            return False  # nothing in it to stop, or no way to
        if num_online:
            # Of a fixed number of tokens, nothing bounds how much of the slack it fills.
            bounded = mode is Mode.ONLINE_DECODE and not self.settings.fixed_step_tokens
            return bounded and self._may_stop
        worn = self.settings.max_stops
        views = (*self.snapshot.running, *self.snapshot.waiting_offline)
        return not any(r.num_stops >= worn for r in views if r.request_id in self.grants)
