"""What a plan does to the engine, and what comes of it: grants, growth, stops, ends of steps."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from conserve.core.blocks import blocks_for
from conserve.core.latency import LatencyModel
from conserve.core.plan import Plan
from conserve.sim.places import Places
from conserve.sim.request import Phase, SimRequest
from conserve.sim.step import Step


class EngineState:
    """Carries plans out, and takes back or completes what they began. Requests and blocks are in
    their `places`."""

    def __init__(self, places: Places, *, strict_classes: bool) -> None:
        self.places = places
        self.counters = places.counters
        self.strict_classes = strict_classes
        """Online before offline where blocks run out (vLLM's priority scheduling)."""
        self._stopped: set[str] = set()
        self._kept: Container[str] = ()
        self._model: LatencyModel | None = None
        self._surprised = False
        """Whether the step's shape is not the plan's: another part of an admitted request's KV was
        found, or a lone token is computed again."""

    # A step begins

    def apply(
        self, plan: Plan, model: LatencyModel | None = None, kept: Container[str] = ()
    ) -> Step:
        """Displace, order copies, allocate, count granted tokens as computed; returns the step.

        As in vLLM, running requests come first and take blocks from others of lower rank
        where none is free; waiting ones are admitted only if nobody had to yield. `kept`:
        whose blocks cannot be freed now, as a step in flight writes them. `model` says whether
        what the host lacks of a request that loses its blocks is worth waiting for.
        """
        places, grants = self.places, plan.grants
        self._kept, self._model = kept, model
        if plan.displace:
            self._displace(plan.displace)
        if plan.checkpoint:
            places.link.order(plan.checkpoint, places.live)
        step = Step(
            plan.mode,
            shape=plan.shape,
            stoppable=plan.stoppable,
            online_shape=plan.online_shape,
            due_s=plan.due_s,
            forced_tokens=plan.forced_tokens,
            predicted_s=plan.predicted_s,
            model=model,
        )
        num_preempted = self.counters.num_preempted
        self._grant_running(step, grants)
        starts = len(step.grants) < len(grants) or plan.restore
        if starts and self.counters.num_preempted == num_preempted:
            self._admit_planned(plan, step)
        places.link.close_orders()
        if step.grants != grants or self._surprised:
            self._surprised = False
            step.sum_up(places.live)
        return step

    def _displace(self, names: Iterable[str]) -> None:
        # In running order, as in the engine: what is freed last is remembered longest.
        victims = set(names)
        for request in [r for r in self.places.running if r.request_id in victims]:
            if request.request_id not in self._kept:
                self.places.evict(request, self._model)
                self.counters.num_displaced += 1
        for request in [r for r in self.places.holding if r.request_id in victims]:
            self.places.give_back(request)

    def _grant_running(self, step: Step, grants: Mapping[str, int]) -> None:
        """In running order, up to the first that finds no block."""
        places, running, grant = self.places, Phase.RUNNING, self._grant
        size = places.machine.block_size
        granted, produces = step.grants, step.producers.append
        for request in list(places.running):
            tokens = grants.get(request.request_id)
            if tokens is None or request.phase is not running:
                continue
            end = request.num_computed_tokens + tokens
            if end > request.num_blocks * size and not self._grow(request, end, step):
                return
            if end == request.num_tokens < request.most_tokens and not request.num_lost_tokens:
                # `_grant` for most requests in most steps, without the call.
                request.num_computed_tokens = end
                request.num_tokens = end + 1
                granted[request.request_id] = tokens
                produces(request)
                if request.online:
                    step.num_online_tokens += tokens
            else:
                grant(step, request, tokens, end)

    def _grant(self, step: Step, request: SimRequest, tokens: int, end: int) -> None:
        if request.num_lost_tokens and request.num_computed_tokens < request.num_lost_tokens:
            lost = min(end, request.num_lost_tokens) - request.num_computed_tokens
            step.num_recomputed_tokens += lost
        request.num_computed_tokens = end
        step.grants[request.request_id] = tokens
        if request.online:
            step.num_online_tokens += tokens
        if end == request.num_tokens:
            step.producers.append(request)
            if end < request.most_tokens:
                request.num_tokens = end + 1
            else:
                step.finishing.append(request)
        elif tokens == 1 and request.token_times_s:
            self._surprised = True

    def _undo(self, step: Step, request: SimRequest, *, produces: bool) -> None:
        """Take back what a grant advanced, as if the step had never held it."""
        tokens = step.grants[request.request_id]
        end = request.num_computed_tokens
        request.num_computed_tokens = end - tokens
        if request.num_computed_tokens < request.num_lost_tokens:
            lost = min(end, request.num_lost_tokens) - request.num_computed_tokens
            step.num_recomputed_tokens -= lost
        if produces:
            request.num_tokens = end

    def _revoke(self, step: Step, request: SimRequest) -> None:
        """Take a request out of a step that has not begun."""
        self._undo(step, request, produces=request in step.producers)
        tokens = step.grants.pop(request.request_id)
        step.num_online_tokens -= tokens if request.online else 0
        for held in (step.producers, step.finishing):
            if request in held:
                held.remove(request)

    def _grow(self, request: SimRequest, end: int, step: Step) -> bool:
        """Blocks up to token `end`; others yield theirs if none is free. False: it has to yield."""
        places = self.places
        need = blocks_for(end, places.machine.block_size) - request.num_blocks
        while need > places.pool.num_free_blocks:
            victim = self._lowest()
            if victim.request_id in self._kept:
                return False
            if victim.request_id in step.grants:
                self._revoke(step, victim)
            places.evict(victim, self._model)
            self.counters.num_preempted += 1
            if victim is request:
                return False
        places.give(request, need)
        return True

    def _lowest(self) -> SimRequest:
        if not self.strict_classes:
            return self.places.running[-1]
        return max(self.places.running, key=lambda r: (not r.online, r.arrival_s))

    def _admit_planned(self, plan: Plan, step: Step) -> None:
        """Waiting requests that the plan starts or restores, up to the first that finds no room:
        in vLLM's order, which puts those that hold blocks first."""
        places, restore, granted = self.places, plan.restore, step.grants
        named = [name for name in (*plan.grants, *restore) if name not in granted]
        waiting = [r for name in named if (r := places.live[name]).phase is Phase.WAITING]
        if restore or places.holding:
            waiting.sort(key=lambda r: (not r.num_blocks, not r.online, r.arrival_s))
        for request in waiting:
            name = request.request_id
            if name not in restore:
                admitted = self._admit(request, plan.grants[name], step)
            else:
                # Once the step is full, vLLM looks at nobody else.
                full = sum(step.grants.values()) >= places.machine.max_step_tokens
                admitted = not full and places.restore(request, restore[name])
            if not admitted:
                return

    def _admit(self, request: SimRequest, tokens: int, step: Step) -> bool:
        """Give a waiting request slot and blocks. False: there are not enough."""
        places = self.places
        if not places.has_room(request):
            return False
        found = places.leave_queue(request)
        self._surprised |= request.num_computed_tokens != found
        request.num_computed_tokens = found
        left = request.num_tokens - found
        # A prompt that is not to be cut is computed whole, though less of it is found than planned.
        tokens = min(tokens, left) if places.machine.chunked_prefill else left
        self._surprised |= tokens == 1 and bool(request.token_times_s)
        places.hold(request, found + tokens)
        places.run(request)
        self._grant(step, request, tokens, found + tokens)
        return True

    # A step ends

    def complete(self, step: Step, now_s: float) -> None:
        """Hand out the step's tokens; requests that have their last one leave."""
        for request in step.producers:
            request.token_times_s.append(now_s)
            request.last_token_s = now_s
        for request in step.finishing:
            self.places.finish(request)
            self._stopped.discard(request.request_id)
        if self._stopped:
            for request_id in self._stopped & step.grants.keys():
                self._stopped.discard(request_id)
                if request_id in self.places.live:
                    self.places.live[request_id].num_stops = 0
        total = step.shape.num_tokens
        self.counters.num_steps += 1
        self.counters.computed_tokens += total
        self.counters.online_tokens += step.num_online_tokens
        self.counters.recomputed_tokens += step.num_recomputed_tokens
        self.counters.useful_tokens += total - step.num_recomputed_tokens

    def drop(self, step: Step) -> None:
        """A stopped step leaves no trace in any request but that it was stopped (P1)."""
        producers = set(step.producers)
        for request_id in step.grants:
            request = self.places.live[request_id]
            self._undo(step, request, produces=request in producers)
            request.num_stops += 1
            self._stopped.add(request_id)
        self.places.nothing_came(step.grants)
        self.counters.num_stopped_steps += 1
        self.counters.computed_tokens += step.shape.num_tokens
        self.counters.dropped_tokens += step.shape.num_tokens
