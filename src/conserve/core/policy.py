"""The policy: who computes how many tokens in the next step. Pure, one call a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain

from conserve.core import checkpointing
from conserve.core.blocks import lacking_blocks, num_tables, promised_blocks
from conserve.core.displacement import NO_SHARING, choose_victims, num_servable
from conserve.core.latency import LatencyModel
from conserve.core.limits import Limits, mode_of, starved, tbt_slack_s
from conserve.core.plan import Mode, Plan
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import RequestView, RunningByClass, Snapshot
from conserve.core.step import UNLIMITED, StepBuilder
from conserve.core.stopping import best_offline_tokens, worth_the_gap

Planner = Callable[[Snapshot, LatencyModel, PolicySettings], Plan]
"""Whoever plans a step: `decide`, or what stands in its place for a profile or a test."""


def decide(snapshot: Snapshot, model: LatencyModel, settings: PolicySettings | None = None) -> Plan:
    """The plan for one step.

    Online requests get what they need, chunked so that resident online decodes keep their
    TBT target; offline requests fill what is left of the step up to a limit that depends on
    who is in it (`Mode`). Costs O(running + waiting online + head of the offline queue).
    """
    return Policy(snapshot, model, settings or PolicySettings()).plan()


class Policy:
    """The decisions on one step, in the order in which they are taken."""

    def __init__(self, snapshot: Snapshot, model: LatencyModel, settings: PolicySettings) -> None:
        self.snapshot = snapshot
        self.model = model
        self.settings = settings
        self.memory = snapshot.memory
        self.step = StepBuilder(snapshot, model)
        if settings.fixed_step_tokens:
            self.step.tokens_left = min(self.step.tokens_left, settings.fixed_step_tokens)
        self.running = RunningByClass.of(snapshot)
        self.held = [r for r in snapshot.waiting_offline if r.num_blocks]
        """Waiting offline requests whose KV has been brought back into blocks."""

    def plan(self) -> Plan:
        slack_s = self.limits.slack_s
        self._grant_online(slack_s)
        online_shape = replace(self.step.shape)
        mode = mode_of(self.snapshot, self.running)
        limit_s = self._offline_limit_s(mode)
        self._grant_offline(limit_s, mode)
        if not self.step.grants:
            self._grant_least()
        num_within = self.step.shape.num_tokens
        self._grant_floor(self.model.predict_s(online_shape))
        shape, num_online = self.step.shape, online_shape.num_tokens
        offline = self.step.staying(self.running.offline)
        return Plan(
            mode=mode if shape.num_tokens else Mode.IDLE,
            grants=self.step.grants,
            displace=list(self.step.displaced),
            checkpoint=checkpointing.copies_by_class(offline, self.running.online, self.snapshot),
            restore=self.step.restores,
            stoppable=self._stoppable(mode, num_online),
            online_shape=online_shape,
            due_s=self.snapshot.now_s + slack_s,
            forced_tokens=UNLIMITED if self.snapshot.whole_prompts else self.settings.min_chunk,
            shape=shape,
            predicted_s=self.model.predict_s(shape),
            limit_s=limit_s,
            num_online_tokens=num_online,
            num_offline_tokens=shape.num_tokens - num_online,
            num_floor_tokens=shape.num_tokens - num_within,
        )

    @cached_property
    def limits(self) -> Limits:
        slack_s = UNLIMITED
        if not self.settings.fixed_step_tokens:
            slack_s = tbt_slack_s(self.running.online_decodes, self.snapshot)
        return Limits(self.snapshot, self.model, self.settings, slack_s, self._may_stop)

    # Online

    def _grant_online(self, slack_s: float) -> None:
        """All decodes, then prefills; what was brought back yields to whoever runs."""
        self.step.resources.claim(self.running.online)
        self.step.grant_decodes(self.running.online_decodes, UNLIMITED)
        self._grant_online_prefills(slack_s if self.running.online_decodes else UNLIMITED)
        if self.held:
            staying = self.step.staying(self.snapshot.running)
            self._release_held(promised_blocks(staying, self.memory) - self.step.blocks_left)

    def _grant_online_prefills(self, limit_s: float) -> None:
        """Chunks for online prefills, those due sooner first; some displace offline ones."""
        floor, due_s = self.settings.min_chunk, self.snapshot.targets.next_due_s
        prefills = sorted(self.running.online_prefills, key=due_s)
        if not prefills and not self.snapshot.waiting_online:
            return
        promised = promised_blocks(self.running.online, self.memory)
        self._displace(promised)
        for request in prefills:
            floor -= self.step.grant_prefill(request, limit_s, at_least=floor)
        if prefills and not self.step.grants:
            self.step.resources.forget_claims()
            for request in prefills:
                floor -= self.step.grant_prefill(request, limit_s, at_least=floor)
        for request in self.step.resources.line(self.snapshot.waiting_online):
            if self._restores_online(request):
                continue
            granted = self.step.start(request, promised, limit_s, at_least=floor)
            floor -= granted
            if not granted:
                break

    def _restores_online(self, request: RequestView) -> bool:
        """Bring its KV back instead, if its first token comes sooner so and nobody who holds blocks
        could take its own meanwhile: a load keeps them, and the engine begins none otherwise."""
        snapshot = self.snapshot
        longest_step_s = snapshot.targets.ttft_s * self.settings.unstoppable_share
        num = checkpointing.tokens_worth_waiting_for(request, snapshot, self.model, longest_step_s)
        if not num:
            return False
        holders = self.step.staying((*snapshot.running, *self.held))
        return self.step.restore(request, num, promised_blocks(holders, self.memory))

    def _displace(self, promised: int) -> None:
        """Make room for as many waiting online requests, first to last, as victims can serve."""
        step, candidates, sharing = self.step, self.running.offline, self.snapshot.sharing
        if not self.settings.displacement:
            # What was brought back and does not run yet gives way all the same (P0).
            candidates, sharing = [], NO_SHARING
        waiting = list(step.resources.line(self.snapshot.waiting_online))
        needs = [lacking_blocks(r, self.memory) for r in waiting]
        fits = len(needs) <= step.slots_left and sum(needs) <= step.blocks_left - promised
        if fits and not self.snapshot.capacity.max_step_embeds:
            return
        # Those who yield may be the only ones to hold what an arrival would share.
        needs = [need + sharing.at_risk(r) for need, r in zip(needs, waiting, strict=True)]
        held = sum(r.num_blocks for r in step.staying(self.held))
        room = step.blocks_left + held - promised
        freeable = room + sum(map(sharing.freed_by, candidates)) + sharing.num_among_offline
        served = num_servable(needs[: step.slots_left + len(candidates)], freeable)
        embeds = self._lacking_embeds(waiting[:served])
        if not embeds and (fits or not served):
            return
        lacking = 0 if fits else sum(needs[:served]) - room
        victims = choose_victims(candidates, lacking, served - step.slots_left, sharing, embeds)
        step.release(victims, slots=True)
        if len(victims) == len(candidates):
            step.blocks_left += sharing.num_among_offline
        self._release_held(promised + sum(needs[:served]) - step.blocks_left)

    def _lacking_embeds(self, arrivals: Sequence[RequestView]) -> int:
        """Room that the encoder's cache lacks for the next media of online requests, and that
        displacing offline ones can make."""
        step, wanting = self.step, (*self.running.online_prefills, *arrivals)
        freeable = sum(request.num_kept_embeds for request in self.running.offline)
        return step.resources.lacking_embeds(wanting, step.tokens_left, freeable)

    def _release_held(self, num_blocks: int) -> None:
        """Requests that were brought back and do not run yet give up `num_blocks` first: what
        they hold lies on the host as well."""
        held = self.step.staying(self.held)
        if num_blocks > 0 and sum(r.num_blocks for r in held) < num_blocks:
            self.step.release(held, slots=False)
        else:
            self.step.release(choose_victims(held, num_blocks, 0), slots=False)

    # Offline

    def _offline_limit_s(self, mode: Mode) -> float:
        """Predicted time, margin included, that offline tokens may fill the step up to."""
        return self.limits.offline_s(mode, self.step.shape)

    def _grant_offline(self, limit_s: float, mode: Mode) -> None:
        """Decodes first (they finish requests and free memory), then prefill chunks in order, for
        which some time is kept where they cost little."""
        step = self.step
        if mode is Mode.OFFLINE and not self.settings.fixed_step_tokens:
            rate = self.snapshot.interruption_rate if limit_s == UNLIMITED else 0.0
            sizes = self.settings.min_chunk, step.tokens_left, self.snapshot.tokens_beside
            step.tokens_left = best_offline_tokens(self.running, self.model, rate, *sizes)
        # Whoever runs longest: so adapters take turns when requests end, not from step to step.
        step.resources.claim(r for r in step.staying(self.snapshot.running) if not r.online)
        decodes = self.running.offline_decodes
        if limit_s < UNLIMITED:
            # The limit may cut the list: whoever waited longest for a token goes first.
            decodes = sorted(decodes, key=lambda r: r.last_token_s or r.arrival_s)
        if mode is Mode.ONLINE_DECODE:
            waited = starved(decodes, self.snapshot.now_s)
            step.grant_first_decode(waited, self.limits.slack_share_s())
        prompts = chain(self.running.offline_prefills, self.snapshot.waiting_offline)
        kept_s = self.limits.prompt_s(limit_s, step.shape, next(prompts, None))
        step.grant_decodes(decodes, limit_s - kept_s)
        for request in step.staying(self.running.offline_prefills):
            if not step.tokens_left:
                break
            step.grant_prefill(request, limit_s)
        if mode is not Mode.ONLINE_PREFILL:
            self._start_offline(limit_s)
        if kept_s:
            step.grant_decodes(decodes, limit_s)

    def _start_offline(self, limit_s: float, at_least: int = 0) -> None:
        """Waiting offline requests in order, while each leaves blocks for all that run. Those
        with a checkpoint worth bringing back begin with that, which takes no tokens. Together they
        may have `at_least` tokens past the limit."""
        step, waiting = self.step, self.snapshot.waiting_offline
        if not step.slots_left or not waiting:
            return
        reserve = len(self.running.offline) * num_tables(self.memory)
        reserve += promised_blocks(self.snapshot.running, self.memory)
        for request in step.resources.line(step.staying(waiting)):
            if step.has(request):
                continue
            kept = reserve + self._room_beside(request)
            if num_tokens := checkpointing.num_restorable(request, self.snapshot, self.model):
                if not step.restore(request, num_tokens, kept):
                    return
                continue
            if not (granted := step.start(request, kept, limit_s, at_least)):
                return
            at_least -= granted

    def _room_beside(self, request: RequestView) -> int:
        """Blocks that a starting offline request must leave to chat's memory: none if it holds its
        own already, or if it is the only one, since offline work must get on (P0)."""
        step = self.step
        if request.num_blocks or not self.snapshot.num_remembered_blocks:
            return 0
        others = step.staying(self.running.offline) or step.restores
        if not others and not any(step.has(r) for r in self.snapshot.waiting_offline):
            return 0
        return self.snapshot.num_remembered_blocks

    # Floor

    def _grant_least(self) -> None:
        """One request's least progress, where the limit is shorter than any step (P0)."""
        step, least = self.step, self.settings.min_chunk
        step.resources.forget_claims()
        for request in self.running.offline_decodes:
            step.grant_decodes([request], UNLIMITED)
            if step.grants:
                return
        for request in step.staying(self.running.offline_prefills):
            if step.grant_prefill(request, 0.0, at_least=least):
                return
        if self.snapshot.waiting_online or step.restores:
            return
        reserve = promised_blocks(self.running.online, self.memory)
        for request in step.staying(self.snapshot.waiting_offline[:1]):
            reserve += self._room_beside(request)
            self._release_for(request, lacking_blocks(request, self.memory) + reserve)
            step.start(request, reserve, 0.0, at_least=least)

    def _release_for(self, request: RequestView, num_blocks: int) -> None:
        """Requests that were brought back too many give way to the first of them, unless somebody
        runs, whose last token is under way: then none has to."""
        if self.step.slots_left < 1 or self.step.staying(self.running.offline):
            return
        if request.num_tokens <= request.num_computed_tokens:
            return
        others = [r for r in self.step.staying(self.held) if r is not request]
        lacking = num_blocks - self.step.blocks_left
        self.step.release(choose_victims(others, lacking, 0), slots=False)

    def _grant_floor(self, online_s: float) -> None:
        """Offline tokens beyond the limit, where the promised share of time is not reached."""
        floor, step = self.snapshot.targets.offline_floor, self.step
        if floor <= 0 or self.snapshot.offline_share >= floor or not online_s:
            return
        limit_s = online_s * (1 + self.model.margin) / (1 - floor)
        # A prompt that cannot be cut passes the limit, so that longer ones have a share as well.
        least = int(self.snapshot.whole_prompts)
        step.grant_decodes(self.running.offline_decodes, limit_s)
        for request in step.staying(self.running.offline_prefills):
            if not step.has(request):
                least -= step.grant_prefill(request, limit_s, at_least=least)
        if all(step.has(r) for r in self.snapshot.waiting_online):
            self._start_offline(limit_s, least)

    # Stoppable

    @cached_property
    def _may_stop(self) -> bool:
        """Whether the step can be stopped whichever requests it turns out to hold."""
        worn = self.settings.max_stops
        views = (*self.snapshot.running, *self.snapshot.waiting_offline)
        return self.snapshot.can_stop and all(r.num_stops < worn for r in views)

    def _stoppable(self, mode: Mode, num_online: int) -> bool:
        if self.step.shape.num_tokens == num_online or not self.snapshot.can_stop:
            return False  # nothing in it to stop, or no way to
        if not worth_the_gap(self.snapshot, self.model, self.settings, self.step.shape):
            return False
        if num_online:
            # Of a fixed number of tokens, nothing bounds how much of the slack it fills.
            bounded = mode is Mode.ONLINE_DECODE and not self.settings.fixed_step_tokens
            return bounded and self._may_stop
        worn = self.settings.max_stops
        views = (*self.snapshot.running, *self.snapshot.waiting_offline)
        return self._may_stop or not any(r.num_stops >= worn for r in views if self.step.has(r))
