"""A tiny engine driven by a policy: blocks, slots, progress, displacement, arrivals, stops.

What an engine does with a plan and nothing else: it allocates block by block, takes blocks
from the last offline request where none is free (so does vLLM), and stops a step for an
arrival when the policy's rule says so. Time is the latency model's, so a run has one trace.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from conserve.core import invariants
from conserve.core.blocks import blocks_for
from conserve.core.latency import LatencyModel
from conserve.core.plan import Plan
from conserve.core.policy import decide
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import RequestView, Snapshot, Targets
from conserve.core.stopping import Arrivals, RunningStep, should_stop
from conserve.core.traffic import TrafficEstimate

Policy = Callable[[Snapshot, LatencyModel, PolicySettings], Plan]
OFFLINE_HEAD = 8


class LivelockError(AssertionError):
    """P0: work is left, and no step gets on with it."""


@dataclass
class Job:
    """A request with a known number of tokens to generate."""

    name: str
    online: bool
    arrival_s: float
    prompt: int
    output: int
    generated: int = 0
    computed: int = 0
    checkpointed: int = 0
    blocks: int = 0
    last_token_s: float | None = None
    stops: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt + self.generated

    @property
    def finished(self) -> bool:
        return self.generated == self.output

    def view(self) -> RequestView:
        return RequestView(
            self.name,
            self.online,
            self.arrival_s,
            num_tokens=self.tokens,
            num_computed_tokens=self.computed,
            num_blocks=self.blocks,
            last_token_s=self.last_token_s,
            num_checkpointed_tokens=self.checkpointed,
            num_stops=self.stops,
        )


@dataclass
class Engine:
    model: LatencyModel
    num_blocks: int
    num_slots: int = 8
    block_size: int = 16
    max_step_tokens: int = 512
    settings: PolicySettings = field(default_factory=PolicySettings)
    targets: Targets = field(default_factory=Targets)
    can_stop: bool = False
    checkpoints: bool = False
    """Whether a displaced request comes back with what it had computed."""
    policy: Policy = decide
    check: bool = True
    adversary: Callable[[Engine, float], Job | None] = lambda engine, step_s: None
    """Called as a stoppable step starts: an online request that arrives during it, or None."""

    now_s: float = 0.0
    num_steps: int = 0
    running: list[Job] = field(default_factory=list)
    online: deque[Job] = field(default_factory=deque)
    offline: deque[Job] = field(default_factory=deque)
    future: deque[Job] = field(default_factory=deque)
    finished: list[Job] = field(default_factory=list)
    traffic: TrafficEstimate = field(default_factory=TrafficEstimate)
    granted: int = 0
    recomputed: int = 0
    dropped: int = 0
    num_taken: int = 0
    """Requests the engine took blocks from for want of free ones, planned by nobody."""

    def submit(self, jobs: Iterable[Job]) -> None:
        self.future = deque(sorted((*self.future, *jobs), key=lambda j: j.arrival_s))

    @property
    def free_blocks(self) -> int:
        return self.num_blocks - sum(job.blocks for job in self.running)

    def run(self, max_steps: int, until: Callable[[], bool] | None = None) -> None:
        """Step until all that was submitted is finished (or `until` holds)."""
        done = until or (lambda: not (self.running or self.online or self.offline or self.future))
        for _ in range(max_steps):
            if done():
                return
            self.step()
        if not done():
            left = [job.name for job in (*self.running, *self.online, *self.offline)]
            raise LivelockError(f"P0: {left} unfinished after {max_steps} steps")

    def step(self) -> Plan:
        self._arrive()
        snapshot = self._snapshot()
        plan = self.policy(snapshot, self.model, self.settings)
        if self.check:
            invariants.check(snapshot, plan, self.model, self.settings)
        self.num_steps += 1
        for name in plan.displace:
            self._evict(self._job(name))
        granted = self._start(plan)
        if granted:
            self._execute(plan, granted)
        elif self.future:
            self._pass(max(0.0, self.future[0].arrival_s - self.now_s))
        elif not plan.displace:
            raise LivelockError("P0: an empty step, and nobody to come")
        return plan

    def _arrive(self) -> None:
        while self.future and self.future[0].arrival_s <= self.now_s:
            job = self.future.popleft()
            if job.online and not self._online_resident():
                self.traffic.interrupted()
            (self.online if job.online else self.offline).append(job)

    def _online_resident(self) -> bool:
        return bool(self.online) or any(job.online for job in self.running)

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            now_s=self.now_s,
            running=[job.view() for job in self.running],
            waiting_online=[job.view() for job in self.online],
            waiting_offline=[job.view() for job in list(self.offline)[:OFFLINE_HEAD]],
            num_free_blocks=self.free_blocks,
            num_free_slots=self.num_slots - len(self.running),
            block_size=self.block_size,
            max_step_tokens=self.max_step_tokens,
            targets=self.targets,
            interruption_rate=self.traffic.interruption_rate,
            online_residency=self.traffic.online_residency,
            offline_share=self.traffic.offline_share,
            can_stop=self.can_stop,
        )

    def _job(self, name: str) -> Job:
        return next(j for j in (*self.running, *self.online, *self.offline) if j.name == name)

    def _evict(self, job: Job) -> None:
        """Out of the engine, to the head of its queue."""
        self.running.remove(job)
        kept = job.computed if self.checkpoints and not job.online else 0
        self.recomputed += job.computed - kept
        job.computed = job.checkpointed = kept
        job.blocks = 0
        (self.online if job.online else self.offline).appendleft(job)

    def _start(self, plan: Plan) -> dict[str, int]:
        """Allocate for every grant; returns the grants that found their blocks."""
        granted: dict[str, int] = {}
        names = {job.name for job in self.running}
        for name, tokens in sorted(plan.grants.items(), key=lambda item: item[0] not in names):
            job = self._job(name)
            if job not in self.running:
                if name in names or len(self.running) >= self.num_slots:
                    continue  # it lost its blocks to an earlier grant, or finds no slot
                (self.online if job.online else self.offline).remove(job)
                self.running.append(job)
            if self._allocate(job, job.computed + tokens, granted):
                granted[name] = tokens
        return granted

    def _allocate(self, job: Job, num_tokens: int, granted: dict[str, int]) -> bool:
        need = blocks_for(num_tokens, self.block_size)
        while need - job.blocks > self.free_blocks:
            victim = max(self.running, key=lambda j: (not j.online, j.arrival_s, j.name))
            granted.pop(victim.name, None)
            self._evict(victim)
            self.num_taken += 1
            if victim is job:
                return False
        job.blocks = max(job.blocks, need)
        return True

    def _execute(self, plan: Plan, granted: dict[str, int]) -> None:
        step_s = plan.predicted_s
        self.granted += sum(granted.values())
        if plan.stoppable:
            intruder = self.adversary(self, step_s)
            if intruder:
                self.submit([intruder])
            if self._stopped(plan):
                self.dropped += sum(granted.values())
                for name in granted:
                    self._job(name).stops += 1
                return
        self._pass(step_s)
        offline_s = step_s * plan.num_offline_tokens / plan.shape.num_tokens
        self.traffic.stepped(step_s, offline_s)
        for name, tokens in granted.items():
            self._progress(self._job(name), tokens)

    def _stopped(self, plan: Plan) -> bool:
        """Whether an arrival stops the step; if so it is now that moment."""
        step_s = plan.predicted_s
        coming = next((job for job in self.future if job.online), None)
        if coming is None or not self.now_s < coming.arrival_s < self.now_s + step_s:
            return False
        stop = should_stop(
            RunningStep(self.now_s, step_s, plan.online_shape, plan.due_s),
            Arrivals(coming.arrival_s, coming.prompt),
            self.model,
            now_s=coming.arrival_s,
            ttft_target_s=self.targets.ttft_s,
            patience=self.settings.patience,
        )
        if stop:
            self._pass(coming.arrival_s - self.now_s)
        return stop

    def _pass(self, seconds: float) -> None:
        self.traffic.spent(seconds, online_resident=self._online_resident())
        self.now_s += seconds

    def _progress(self, job: Job, tokens: int) -> None:
        job.computed += tokens
        job.stops = 0
        if self.checkpoints and not job.online:
            job.checkpointed = job.computed
        if job.computed == job.tokens:
            job.generated += 1
            job.last_token_s = self.now_s
        if job.finished:
            self.running.remove(job)
            self.finished.append(job)
