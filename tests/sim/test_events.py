"""What happens at the same instant happens in the declared order."""

from __future__ import annotations

from itertools import permutations

import pytest

from conserve.core.latency import LatencyModel
from conserve.sim.cost import Machine
from conserve.sim.engine import Engine
from conserve.sim.events import EventKind, EventQueue
from conserve.sim.request import SimRequest
from conserve.sim.stock import StockScheduler


@pytest.mark.parametrize("pushed", list(permutations(EventKind)))
def test_kinds_leave_in_declared_order_however_they_came(pushed: tuple[EventKind, ...]) -> None:
    queue = EventQueue()
    for kind in pushed:
        queue.push(1.0, kind)
    assert [queue.pop()[1] for _ in pushed] == [
        EventKind.STEP_END,
        EventKind.RESTORED,
        EventKind.ARRIVAL,
        EventKind.JUDGE,
        EventKind.SCHEDULE,
    ]


def test_within_a_kind_first_pushed_comes_first() -> None:
    queue = EventQueue()
    for name in "cab":
        queue.push(2.0, EventKind.ARRIVAL, name)
    queue.push(1.0, EventKind.SCHEDULE, "earlier")
    assert [queue.pop()[2] for _ in range(4)] == ["earlier", "c", "a", "b"]


def _request(name: str, arrival_s: float, num_tokens: int) -> SimRequest:
    return SimRequest.arriving(
        name, online=True, arrival_s=arrival_s, num_prompt_tokens=num_tokens, num_output_tokens=1
    )


def test_an_arrival_at_the_end_of_a_step_is_known_to_the_decision_of_that_instant() -> None:
    """One block in all: the step's end must free it before the arrival is considered."""
    engine = Engine(
        Machine(num_blocks=1), LatencyModel(fixed=1.0, per_token=0.0), StockScheduler(by_class=True)
    )
    # Pushed in the reverse order of time, so that the heap alone decides.
    late, early = _request("late", 1.0, 16), _request("early", 0.0, 16)
    engine.submit(late)
    engine.submit(early)
    engine.run()
    assert early.token_times_s == [1.0]
    assert late.token_times_s == [2.0]


def test_arrivals_of_one_instant_are_served_in_the_order_they_were_sent() -> None:
    engine = Engine(
        Machine(num_blocks=100, max_step_tokens=16),
        LatencyModel(fixed=1.0, per_token=0.0),
        StockScheduler(by_class=True),
    )
    requests = [_request(name, 0.0, 16) for name in "bca"]
    for request in requests:
        engine.submit(request)
    engine.run()
    assert [r.token_times_s for r in requests] == [[1.0], [2.0], [3.0]]
