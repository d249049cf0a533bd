"""What one client's request has the engine compute, as vLLM's output processor counts it.

The processor is the one place that has the counts of every request: streamed or not, whether the
client asked for `usage` or not, and of those that it abandoned. The answer has them in some of
these cases only.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Literal

from conserve.batch.usage_store import Counts

_current: ContextVar[Meter | None] = ContextVar("conserve_usage_meter", default=None)


class _Asked:
    """One request to the engine."""

    def __init__(self, processor: Any, state: Any) -> None:
        self._processor = processor
        self._state = state
        self._num_output = 0
        self.prompt_is_counted = False
        self.prompt_name = state.parent_req.request_id if state.parent_req else state.request_id
        """The same for all answers to one prompt (`n`)."""

    @property
    def is_running(self) -> bool:
        return self._processor.request_states.get(self._state.request_id) is self._state

    @property
    def has_prompt(self) -> bool:
        """Whether its prompt is computed: it has an output."""
        return not self._state.is_prefilling

    @property
    def prompt(self) -> Counts:
        cached = min(self._state.num_cached_tokens, self._state.prompt_len)
        return Counts(input_tokens=self._state.prompt_len, cached_tokens=max(0, cached))

    def more_output(self) -> Counts:
        """Since the last time."""
        before, detokenizer = self._num_output, self._state.detokenizer
        self._num_output = detokenizer.num_output_tokens() if detokenizer else 0
        return Counts(output_tokens=self._num_output - before)


class Meter:
    """Of one request of a client, which may ask the engine many times, or not at all."""

    def __init__(self, owner: str, opened: Callable[[Meter], None]) -> None:
        """`opened` is told each time that it asks: what a client left behind may ask long after its
        answer, as a response in the background does between its tools."""
        self.owner = owner
        self.is_over = False
        """The client has its answer, or has gone."""
        self.model: str | None = None
        """The adapter's name; None is the model itself."""
        self.request_class: Literal["online", "flex"] = "online"
        self._opened = opened
        self._has_asked = False
        self._end = Counts()
        """The request itself, until it is taken."""
        self._asked: list[_Asked] = []
        self._prompts: set[str] = set()
        self._more = Counts()

    def asks(self, processor: Any, request: Any, state: Any) -> None:
        self._opened(self)
        if not self._has_asked:
            self._has_asked = True
            self.model = state.lora_name
            self.request_class = "flex" if request.priority > 0 else "online"
        self._gather()  # beam search asks once for each token: what has ended is let go
        self._asked.append(_Asked(processor, state))

    def end(self, *, is_complete: bool) -> None:
        """The client has its answer, or will not get it."""
        self.is_over = True
        self._end = Counts(completed=1) if is_complete else Counts(failed=1)

    def take(self) -> Counts:
        """Tokens computed since the last call; and the request, once that is over and has asked."""
        self._gather()
        more, self._more = self._more, Counts()
        if self._has_asked:
            more, self._end = more + self._end, Counts()
        return more

    @property
    def is_running(self) -> bool:
        """Whether the engine still computes something for it, as of a response that runs in the
        background."""
        return any(one.is_running for one in self._asked)

    def _gather(self) -> None:
        for one in self._asked:
            if one.has_prompt and not one.prompt_is_counted:
                one.prompt_is_counted = True
                if one.prompt_name not in self._prompts:
                    self._prompts.add(one.prompt_name)
                    self._more += one.prompt
            self._more += one.more_output()
        self._asked = [one for one in self._asked if one.is_running]


def measure(meter: Meter | None) -> None:
    """What this task asks of the engine from here on is `meter`'s."""
    _current.set(meter)


def tell_meter(processor: Any, request: Any, state: Any) -> None:
    if (meter := _current.get()) is not None:
        meter.asks(processor, request, state)
