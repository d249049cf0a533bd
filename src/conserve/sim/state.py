"""The engine between two events: queues, running requests, blocks; and what a plan does to them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping
from itertools import takewhile

from conserve.core.displacement import blocks_for
from conserve.core.plan import Plan
from conserve.sim.cost import Machine
from conserve.sim.counters import Counters
from conserve.sim.memory import BlockPool
from conserve.sim.request import Phase, SimRequest
from conserve.sim.step import Step

RestoreRule = Callable[[SimRequest, int], bool]
"""Whether a returning request restores its checkpoint rather than compute from a token on."""


class EngineState:
    """Who is where. Every change of a request's phase and blocks happens here."""

    def __init__(
        self, machine: Machine, *, strict_classes: bool, prefix_caching: bool = True
    ) -> None:
        self.machine = machine
        self.strict_classes = strict_classes
        """Online before offline where blocks run out (vLLM's priority scheduling)."""
        self.pool = BlockPool(machine.num_blocks, prefix_caching=prefix_caching)
        self.live: dict[str, SimRequest] = {}
        self.running: list[SimRequest] = []
        self.restoring: list[SimRequest] = []
        self.waiting_online: deque[SimRequest] = deque()
        self.waiting_offline: deque[SimRequest] = deque()
        self.num_online = 0
        """Online requests that wait or run."""
        self.counters = Counters()
        self._stopped: set[str] = set()
        self._kept: Container[str] = ()
        self._surprised = False
        """Whether the step's shape is not the plan's: another part of an admitted request's KV was
        found, or a lone token is computed again."""
        self._mixed = False
        """Whether an online request may stand behind an offline one in `running`."""

    @property
    def num_free_slots(self) -> int:
        return self.machine.max_running - len(self.running) - len(self.restoring)

    def _queue_of(self, request: SimRequest) -> deque[SimRequest]:
        return self.waiting_online if request.online else self.waiting_offline

    def arrive(self, request: SimRequest) -> None:
        """Queue a request. Raises ValueError if the machine could never finish it."""
        need = blocks_for(request.most_tokens, self.machine.block_size)
        if need > self.machine.num_blocks:
            raise ValueError(
                f"{request.request_id} needs {need} KV blocks and the machine has "
                f"{self.machine.num_blocks}: give it more memory, or shorten the request"
            )
        self.live[request.request_id] = request
        self._queue_of(request).append(request)
        self.num_online += request.online

    def note_found(self, waiting: Iterable[SimRequest]) -> None:
        """What waiting requests need not compute: a checkpoint, or KV still in freed blocks (which
        the engine looks for only as far as one step's tokens reach)."""
        size, most = self.machine.block_size, self.machine.max_step_tokens
        for request in waiting:
            longest = request.num_tokens - 1
            found = self.pool.remembered_of(request.request_id) if most > 0 else 0
            if not found and not request.num_checkpointed_tokens:
                request.num_computed_tokens = 0
                most -= request.num_tokens
                continue
            found = min(found, longest // size) * size
            request.num_computed_tokens = max(found, min(request.num_checkpointed_tokens, longest))
            most -= request.num_tokens - request.num_computed_tokens

    def put_online_first(self) -> None:
        """Blocks are granted in the order of `running`; offline requests come last."""
        if self._mixed:
            self._mixed = False
            self.running.sort(key=lambda request: not request.online)

    # A step begins

    def apply(self, plan: Plan, restores: RestoreRule, kept: Container[str] = ()) -> Step:
        """Displace, allocate, and count the granted tokens as computed; returns the step.

        As in vLLM, running requests come first and take blocks from others of lower rank
        where none is free; waiting ones are admitted only if nobody had to yield. `kept`:
        whose blocks cannot be freed now, as a step in flight writes them.
        """
        self._kept = kept
        if plan.displace:
            # In running order, as in the engine: what is freed last is remembered longest.
            victims = set(plan.displace)
            for request in [r for r in self.running if r.request_id in victims]:
                if request.request_id not in kept:
                    self._evict(request)
                    self.counters.num_displaced += 1
        step = Step(
            plan.mode, shape=plan.shape, stoppable=plan.stoppable, predicted_s=plan.predicted_s
        )
        grants, num_preempted = plan.grants, self.counters.num_preempted
        self._grant_running(step, grants)
        if len(step.grants) < len(grants) and self.counters.num_preempted == num_preempted:
            for request_id, tokens in grants.items():
                request = self.live[request_id]
                waits = request.phase is Phase.WAITING
                if waits and not self._admit(request, tokens, step, restores):
                    break
        if step.grants != plan.grants or self._surprised:
            self._surprised = False
            step.sum_up(self.live)
        return step

    def _grant_running(self, step: Step, grants: Mapping[str, int]) -> None:
        """In running order, up to the first that finds no block."""
        size, running, grant = self.machine.block_size, Phase.RUNNING, self._grant
        granted, produces = step.grants, step.producers.append
        for request in list(self.running):
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
        need = blocks_for(end, self.machine.block_size) - request.num_blocks
        while need > self.pool.num_free_blocks:
            victim = self._lowest()
            if victim.request_id in self._kept:
                return False
            if victim.request_id in step.grants:
                self._revoke(step, victim)
            self._evict(victim)
            self.counters.num_preempted += 1
            if victim is request:
                return False
        self.pool.take(request.request_id, need)
        request.num_blocks += need
        return True

    def _lowest(self) -> SimRequest:
        if not self.strict_classes:
            return self.running[-1]
        return max(self.running, key=lambda r: (not r.online, r.arrival_s))

    def _admit(self, request: SimRequest, tokens: int, step: Step, restores: RestoreRule) -> bool:
        """Give a waiting request slot and blocks. False: there are not enough."""
        if request.phase is not Phase.WAITING:
            return True
        size, owner = self.machine.block_size, request.request_id
        if self.num_free_slots < 1:
            return False
        if blocks_for(request.num_tokens, size) > self.pool.num_free_blocks:
            return False
        queue = self._queue_of(request)
        if queue[0] is request:
            queue.popleft()
        else:
            queue.remove(request)
        found = self.pool.reclaim(owner, (request.num_tokens - 1) // size)
        request.num_blocks = found
        if request.num_checkpointed_tokens > found * size and restores(request, found * size):
            self._hold(request, request.num_computed_tokens)
            request.move(Phase.RESTORING)
            self.restoring.append(request)
            return True
        self.counters.reclaimed_tokens += found * size
        self._surprised |= request.num_computed_tokens != found * size
        request.num_computed_tokens = found * size
        tokens = min(tokens, request.num_tokens - request.num_computed_tokens)
        self._surprised |= tokens == 1 and bool(request.token_times_s)
        self._hold(request, request.num_computed_tokens + tokens)
        request.move(Phase.RUNNING)
        self.running.append(request)
        self._mixed |= request.online
        self._grant(step, request, tokens, request.num_computed_tokens + tokens)
        return True

    def _hold(self, request: SimRequest, end: int) -> None:
        need = blocks_for(end, self.machine.block_size) - request.num_blocks
        if need > 0:
            self.pool.take(request.request_id, need)
            request.num_blocks += need

    def _evict(self, request: SimRequest) -> None:
        """Free a running request's blocks; it waits again, where its arrival places it."""
        self.running.remove(request)
        request.move(Phase.WAITING)
        queue = self._queue_of(request)
        earlier = (r.arrival_s <= request.arrival_s for r in queue)
        queue.insert(sum(takewhile(bool, earlier)), request)
        computed = request.num_computed_tokens
        request.num_lost_tokens = max(request.num_lost_tokens, computed)
        self.pool.free(request.request_id, num_remembered=computed // self.machine.block_size)
        request.num_blocks = 0
        # What its checkpoint holds needs no computing, if it is restored.
        request.num_computed_tokens = min(request.num_checkpointed_tokens, request.num_tokens - 1)

    # A step ends

    def complete(self, step: Step, now_s: float) -> None:
        """Hand out the step's tokens; requests that have their last one leave."""
        for request in step.producers:
            request.token_times_s.append(now_s)
            request.last_token_s = now_s
        for request in step.finishing:
            self._finish(request)
        if self._stopped:
            for request_id in self._stopped & step.grants.keys():
                self._stopped.discard(request_id)
                if request_id in self.live:
                    self.live[request_id].num_stops = 0
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
            request = self.live[request_id]
            self._undo(step, request, produces=request in producers)
            request.num_stops += 1
            self._stopped.add(request_id)
        self.counters.num_stopped_steps += 1
        self.counters.computed_tokens += step.shape.num_tokens
        self.counters.dropped_tokens += step.shape.num_tokens

    def restored(self, request: SimRequest) -> None:
        self.restoring.remove(request)
        request.move(Phase.RUNNING)
        self.running.append(request)

    def _finish(self, request: SimRequest) -> None:
        if request.phase is Phase.RUNNING:
            self.running.remove(request)
            whole = request.num_computed_tokens // self.machine.block_size
            self.pool.free(request.request_id, num_remembered=whole)
        else:
            # It was displaced while its last token was in flight.
            self._queue_of(request).remove(request)
            self.pool.reclaim(request.request_id, 0)
        request.num_blocks = 0
        request.move(Phase.FINISHED)
        self.num_online -= request.online
        del self.live[request.request_id]
        self._stopped.discard(request.request_id)
