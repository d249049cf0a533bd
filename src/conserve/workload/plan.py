"""What a run sends: the plan of each request, and of all."""

from __future__ import annotations

from dataclasses import dataclass, field

from .scaling import Scale


@dataclass(frozen=True, slots=True)
class Window:
    """A run's spans in seconds. Its clock is 0 at the end of the lead-in, which offline requests
    begin."""

    lead_in_s: float
    duration_s: float
    drain_s: float


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """One request to send.

    arrival_s: when it is sent, on the run's clock; an offline one may wait for its turn after it.
    That of a conversation's later turn says nothing.
    prefix: (name, tokens) of the texts its prompt begins with; equal names are equal texts. What
    they leave of num_prompt_tokens is text no other request has.
    session: the conversation it is a turn of; its prompt begins with num_history_tokens, which are
    the prompt and the answer of the turn before, and is sent pause_s after that one's last token.
    """

    request_id: str
    online: bool
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    prefix: tuple[tuple[str, int], ...] = ()
    session: str = ""
    num_history_tokens: int = 0
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Workload:
    """online: by arrival. offline: in the order they are sent, `in_flight` at a time.

    next_turns: of conversations, by the id of the turn whose answer each waits for.
    """

    online: list[RequestPlan] = field(default_factory=list)
    offline: list[RequestPlan] = field(default_factory=list)
    in_flight: int = 0
    scales: list[Scale] = field(default_factory=list)
    next_turns: dict[str, RequestPlan] = field(default_factory=dict)

    @property
    def lead_in_s(self) -> float:
        """How long before the clock's 0 its first request is sent."""
        return -min([0.0, *(plan.arrival_s for plan in (*self.online[:1], *self.offline[:1]))])
