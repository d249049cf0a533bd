"""A simulated request and its life."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from conserve.core.snapshot import RequestView
from conserve.metrics import CUT_OFF, RequestRecord
from conserve.sim.text import Text
from conserve.workload import RequestPlan


class Phase(StrEnum):
    WAITING = "waiting"
    """In the queue: without blocks, or with what has been restored of it."""
    RUNNING = "running"
    """It holds a slot; its blocks grow as it computes."""
    RESTORING = "restoring"
    """Its checkpoint is on the way back into its blocks; it has no slot and computes nothing."""
    FINISHED = "finished"


TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.WAITING: frozenset({Phase.RUNNING, Phase.RESTORING, Phase.FINISHED}),
    Phase.RESTORING: frozenset({Phase.WAITING}),
    Phase.RUNNING: frozenset({Phase.WAITING, Phase.FINISHED}),
    Phase.FINISHED: frozenset(),
}
"""WAITING -> FINISHED: displaced under async scheduling while its last token was in flight."""


@dataclass(slots=True, eq=False)
class SimRequest(RequestView):
    """The policy's view of a request is the request itself, so a snapshot copies nothing.

    With a step in flight, `num_computed_tokens` and `num_tokens` already hold what it will
    have done, as vLLM counts them.
    """

    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    """Tokens it will have produced when it finishes; known to the simulator, not to the policy."""
    phase: Phase = Phase.WAITING
    token_times_s: list[float] = field(default_factory=list)
    num_lost_tokens: int = 0
    """KV up to here was computed before and lost: computing it again is waste."""
    num_landed_tokens: int = 0
    """Leading tokens whose copies have arrived on the host. `num_checkpointed_tokens`, which the
    policy sees, is the same while it runs; while it waits, those under way count as well."""
    most_tokens: int = 0
    """Tokens whose KV it holds when its last token is sampled."""
    text: Text = field(default_factory=lambda: Text(""))
    num_cached_tokens: int | None = None
    """Those that it found in the prefix cache when it first ran."""
    num_found_tokens: int = 0
    """The same of when it last left the queue."""

    # Each is itself: queues are searched by identity.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @classmethod
    def arriving(
        cls,
        request_id: str,
        *,
        online: bool,
        arrival_s: float,
        num_prompt_tokens: int,
        num_output_tokens: int,
        ttft_target_s: float | None = None,
        tbt_target_s: float | None = None,
        text: Text | None = None,
        adapter: int = 0,
    ) -> SimRequest:
        """An offline request's target is when it would like its first token. Raises ValueError."""
        if num_prompt_tokens < 1 or num_output_tokens < 1:
            raise ValueError(f"{request_id}: a request needs a prompt token and an output token")
        wanted = None if ttft_target_s is None else arrival_s + ttft_target_s
        return cls(
            request_id=request_id,
            online=online,
            arrival_s=arrival_s,
            num_tokens=num_prompt_tokens,
            deadline_s=None if online else wanted,
            ttft_target_s=ttft_target_s if online else None,
            tbt_target_s=tbt_target_s if online else None,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=num_output_tokens,
            most_tokens=num_prompt_tokens + num_output_tokens - 1,
            text=text or Text(request_id),
            adapter=adapter,
        )

    @classmethod
    def of(cls, plan: RequestPlan, arrival_s: float) -> SimRequest:
        """The request that a workload planned, reaching the engine at `arrival_s`."""
        return cls.arriving(
            plan.request_id,
            online=plan.online,
            arrival_s=arrival_s,
            num_prompt_tokens=plan.num_prompt_tokens,
            num_output_tokens=plan.num_output_tokens,
            text=Text.of(plan),
        )

    def move(self, phase: Phase) -> None:
        if phase not in TRANSITIONS[self.phase]:
            raise ValueError(f"{self.request_id}: {self.phase} cannot become {phase}")
        self.phase = phase

    def record(self, frontend_s: float = 0.0) -> RequestRecord:
        """What its client saw, who sent it `frontend_s` before the engine had it."""
        return RequestRecord(
            request_id=self.request_id,
            online=self.online,
            arrival_s=self.arrival_s - frontend_s,
            token_times_s=self.token_times_s,
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=len(self.token_times_s),
            num_cached_tokens=self.num_cached_tokens,
            error=None if self.phase is Phase.FINISHED else CUT_OFF,
        )
