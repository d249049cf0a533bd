"""What the scheduler remembers of each request beyond what vLLM keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from conserve.core.blocks import Memory, held_blocks
from conserve.core.latency import StepShape
from conserve.core.snapshot import RequestView
from conserve.engine.needs import adapter_of
from conserve.engine.promises import OwnTargets, Promises
from conserve.engine.queue import is_online
from conserve.engine.speculation import Drafting
from conserve.engine.stats import EngineStats

ANY_STEP = 1 << 60
"""One that comes late enough for everybody."""
NONE_REFUSED: Mapping[str, int] = {}


def class_of(view: RequestView) -> str:
    return "online" if view.online else "offline"


def comes_back(request: Any) -> bool:
    """Whether vLLM asks connectors for its KV: not for a request that wants the logprobs of its
    prompt, which needs all of the prompt computed. A session that is told more drops what it said
    last, and waits with its blocks, which it may lose while copies out of them are under way."""
    return not (request.skip_reading_prefix_cache or request.resumable)


class RequestTracker:
    """One `RequestView` a request, brought up to date when it is looked at."""

    def __init__(
        self, memory: Memory, promises: Promises, drafting: Drafting | None = None
    ) -> None:
        self._memory = memory
        self._promises = promises
        self._drafting = drafting or Drafting()
        self._views: dict[str, RequestView] = {}
        self._high_water: dict[str, int] = {}
        """Most tokens a request ever had computed: less than that again is recomputed."""
        self._reached: dict[str, int] = {}
        """Tokens for which a running request has blocks, though it has fewer computed: a step of it
        was stopped, or its drafts were refused."""

    def add(self, request: Any, arrived_s: float) -> None:
        view = RequestView(
            request_id=request.request_id,
            online=is_online(request),
            arrival_s=arrived_s,
            num_tokens=request.num_tokens,
            can_restore=comes_back(request),
            adapter=adapter_of(request),
        )
        if view.online:
            view.ttft_target_s, view.tbt_target_s = self._promises.own_targets(request)
        elif (wanted_s := OwnTargets.named_by(request).ttft_s) is not None:
            view.deadline_s = arrived_s + wanted_s
        self._views[request.request_id] = view
        self._high_water.pop(request.request_id, None)
        self._reached.pop(request.request_id, None)

    def drop_finished(self, live: dict[str, Any]) -> None:
        """Forget every request that is not in `live`; call it now and then."""
        if len(self._views) > 2 * len(live) + 64:
            self._views = {name: view for name, view in self._views.items() if name in live}
            self._high_water = {n: high for n, high in self._high_water.items() if n in live}
            self._reached = {n: end for n, end in self._reached.items() if n in live}

    def forget_all(self) -> None:
        self._views.clear()
        self._high_water.clear()
        self._reached.clear()

    def get(self, request_id: str) -> RequestView | None:
        return self._views.get(request_id)

    def running(self, requests: Iterable[Any], step: int = ANY_STEP) -> list[RequestView]:
        """Views of running requests; the answer is good until the next step is scheduled. `step`
        is the number that vLLM gives to that one."""
        views, found, reached, drafting = [], self._views, self._reached, self._drafting
        for request in requests:
            view = found[request.request_id]
            computed, in_flight = request.num_computed_tokens, request.num_output_placeholders
            # Of a request whose last token is in flight, though all drafts before it should be
            # refused, nothing is left to compute; of one whose token is with a later stage of a
            # pipeline, nothing in this step.
            end = request.num_prompt_tokens + request.max_tokens
            ends = in_flight and computed - in_flight + 2 >= end
            rests = ends or step < request.next_decode_eligible_step
            known = computed if rests else request.num_tokens_with_spec + in_flight
            view.num_tokens = known if known < drafting.longest else drafting.longest
            view.num_computed_tokens = computed
            end = max(computed, reached.get(view.request_id, 0)) if reached else computed
            if drafting.num_lookahead_tokens:
                view.num_lookahead_tokens = drafting.num_ahead(view.num_tokens)
                end += drafting.num_ahead(end)
            view.num_blocks = held_blocks(end, self._memory)
            views.append(view)
        return views

    def waiting(
        self,
        requests: Iterable[Any],
        find_cached: Callable[[Any], tuple[int, int]],
        most_tokens: int,
    ) -> list[RequestView]:
        """Views of waiting requests. What they had computed before or the prefix cache has of
        them counts as computed; only the former holds blocks. Looks into the cache for those
        only that `most_tokens` can reach; those that hold blocks are known without a look.
        `find_cached`: a request's tokens there, and how many blocks of them others hold."""
        views = []
        for request in requests:
            view = self._views[request.request_id]
            view.num_tokens = request.num_tokens
            looks = most_tokens > 0 or request.num_computed_tokens > 0
            found = find_cached(request) if looks else (0, 0)
            view.num_computed_tokens, view.num_borrowed_blocks = found
            view.num_blocks = held_blocks(request.num_computed_tokens, self._memory)
            view.num_lookahead_tokens = self._drafting.num_ahead(view.num_tokens)
            self._reached.pop(request.request_id, None)
            most_tokens -= view.num_tokens - view.num_computed_tokens
            views.append(view)
        return views

    def shape_of(
        self, num_scheduled_tokens: dict[str, int], requests: dict[str, Any], decode_width: int
    ) -> tuple[StepShape, StepShape]:
        """The step that vLLM really scheduled (prefix hits make it smaller than planned):
        of all requests, and of the offline ones alone. Call it before the step is undone."""
        whole, offline = StepShape(), StepShape()
        for request_id, num_tokens in num_scheduled_tokens.items():
            view = self._views[request_id]
            context = requests[request_id].num_computed_tokens - num_tokens
            decodes = view.last_token_s is not None and num_tokens <= decode_width
            for shape in (whole,) if view.online else (whole, offline):
                if decodes:
                    shape.add_decode(num_tokens, context)
                else:
                    shape.add_prefill(num_tokens, context)
        return whole, offline

    def computed(
        self,
        num_scheduled_tokens: dict[str, int],
        ends: dict[str, int],
        stats: EngineStats,
        refused: Mapping[str, int] = NONE_REFUSED,
    ) -> None:
        """Account for a step that ran to its end (P7): computed, and of that recomputed. `ends`
        are the requests' computed tokens by this step, as a later one may be under way; `refused`
        the drafts that it computed and that were wrong, for nothing."""
        totals = {"online": [0, 0], "offline": [0, 0]}
        for request_id, num_tokens in num_scheduled_tokens.items():
            view = self._views.get(request_id)
            if view is None:
                continue
            view.num_stops = 0
            end = ends[request_id]
            high = self._high_water.get(request_id, 0)
            start = end - (num_tokens - refused.get(request_id, 0))
            again = max(0, min(end, high) - start)
            self._high_water[request_id] = max(high, end)
            total = totals[class_of(view)]
            total[0] += num_tokens
            total[1] += again
        for label, (computed, again) in totals.items():
            if computed:
                stats.count("computed_tokens", computed, label)
            if again:
                stats.count("recomputed_tokens", again, label)

    def stopped(self, num_scheduled_tokens: dict[str, int], ends: dict[str, int]) -> None:
        """Account for a step that was stopped; `ends` as for `computed`."""
        for request_id in num_scheduled_tokens:
            if view := self._views.get(request_id):
                view.num_stops += 1
                self.reached(request_id, ends[request_id])

    def reached(self, request_id: str, num_tokens: int) -> None:
        """A running request has blocks for so many tokens, whatever of them is taken back."""
        self._reached[request_id] = max(self._reached.get(request_id, 0), num_tokens)

    def drafted(self, request_id: str, num_drafts: int, num_right: int, stats: EngineStats) -> None:
        """Drafts of a request were in a step that ran to its end."""
        if view := self._views.get(request_id):
            stats.count("draft_tokens", num_drafts, class_of(view))
            stats.count("accepted_draft_tokens", num_right, class_of(view))

    def emitted(self, request_id: str, num_tokens: int, now_s: float, stats: EngineStats) -> None:
        """New tokens of a request left the engine."""
        view = self._views.get(request_id)
        if view is None:
            return
        label = class_of(view)
        late = view.online and now_s > self._promises.targets.next_due_s(view)
        if view.last_token_s is None:
            stats.observe("ttft_seconds", now_s - view.arrival_s, label)
            kind = "late_first_tokens"
        else:
            stats.observe("tbt_seconds", now_s - view.last_token_s, label)
            kind = "late_tokens"
        if late:
            stats.count(kind)
        view.last_token_s = now_s
        stats.count("output_tokens", num_tokens, label)
