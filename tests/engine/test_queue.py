"""The waiting queue against a sorted list, and against vLLM's own queue for one class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from vllm.v1.core.sched.request_queue import PriorityRequestQueue, RequestQueue

from conserve.engine.queue import ClassQueue, is_online

pytestmark = pytest.mark.engine
calm = settings(derandomize=True, deadline=None, database=None)


@dataclass(eq=False)
class Request:
    """What a queue looks at, ordered as vLLM's Request."""

    request_id: str
    priority: int
    arrival_time: float

    def _key(self) -> tuple[int, float, str]:
        return self.priority, self.arrival_time, self.request_id

    def __lt__(self, other: Request) -> bool:
        return self._key() < other._key()


def names(requests: Any) -> list[str]:
    return [request.request_id for request in requests]


Operation = tuple[str, int]
operations = st.lists(
    st.tuples(
        st.sampled_from(["add", "prepend", "pop", "remove", "remove_many", "return_skipped"]),
        st.integers(0, 10_000),
    ),
    max_size=60,
)


def play(queue: RequestQueue, requests: list[Request], script: list[Operation]) -> None:
    """Run the script on the queue and on a sorted list; they must agree after every line."""
    unused, model = list(requests), []
    for verb, number in script:
        if verb in ("add", "prepend") and unused:
            request = unused.pop(number % len(unused))
            (queue.add_request if verb == "add" else queue.prepend_request)(request)
            model.append(request)
        elif verb == "pop" and model:
            first = min(model)
            assert queue.peek_request() is first
            assert queue.pop_request() is first
            model.remove(first)
        elif verb == "remove" and model:
            request = model.pop(number % len(model))
            queue.remove_request(request)
        elif verb == "remove_many":
            chosen = requests[number % len(requests) :: 3]
            queue.remove_requests(chosen)
            model = [request for request in model if request not in chosen]
        elif verb == "return_skipped" and len(model) > 1:
            skipped = [queue.pop_request(), queue.pop_request()]
            queue.prepend_requests(reversed(skipped))
        assert names(queue) == names(sorted(model))
        assert len(queue) == len(model)
        assert bool(queue) == bool(model)


def requests_of(numbers: list[tuple[int, int]]) -> list[Request]:
    return [
        Request(f"r{i}", priority, float(arrival)) for i, (priority, arrival) in enumerate(numbers)
    ]


both_classes = st.lists(
    st.tuples(st.integers(-2, 3), st.integers(0, 5)), min_size=1, max_size=20
).map(requests_of)
one_class = st.lists(st.tuples(st.just(1), st.integers(0, 5)), min_size=1, max_size=20).map(
    requests_of
)


@calm
@given(both_classes, operations)
def test_the_queue_is_a_sorted_list(requests: list[Request], script: list[Operation]) -> None:
    play(ClassQueue(), requests, script)


@pytest.mark.parametrize("make", [ClassQueue, PriorityRequestQueue])
@calm
@given(requests=one_class, script=operations)
def test_one_class_is_queued_as_vllm_queues_it(
    make: Callable[[], RequestQueue], requests: list[Request], script: list[Operation]
) -> None:
    play(make(), requests, script)


class LastInFirstOut(ClassQueue):
    """Careless: forgets that a request regains its place."""

    def pop_request(self) -> Any:
        return (self.online or self.offline).pop()


def test_a_careless_queue_is_caught() -> None:
    """The negative control."""
    with pytest.raises(AssertionError):
        play(LastInFirstOut(), requests_of([(1, 0), (1, 1)]), [("add", 0), ("add", 0), ("pop", 0)])


def test_online_goes_before_any_offline_request() -> None:
    queue = ClassQueue()
    for i, priority in enumerate([5, 1, 0, -3, 1]):
        queue.add_request(Request(f"r{i}", priority, 10.0 - i))
    assert names(queue.online) == ["r3", "r2"]
    assert names(queue.offline) == ["r4", "r1", "r0"]
    assert all(is_online(request) for request in queue.online)
    assert not any(is_online(request) for request in queue.offline)


def test_the_head_of_the_backlog_stays_queued() -> None:
    queue = ClassQueue()
    for i in range(5):
        queue.add_request(Request(f"r{i}", 1, float(i)))
    assert names(queue.offline_head(3)) == ["r0", "r1", "r2"]
    assert names(queue.offline_head(9)) == names(queue)
    assert len(queue) == 5


def test_an_empty_queue_says_so() -> None:
    queue, stranger = ClassQueue(), Request("x", 1, 0.0)
    for take in (queue.peek_request, queue.pop_request):
        with pytest.raises(IndexError):
            take()
    with pytest.raises(ValueError, match="not in list"):
        queue.remove_request(stranger)
    queue.remove_requests([stranger])
    assert not queue


def test_removed_while_queued_with_equal_neighbours() -> None:
    """Same priority, same moment: the right one goes."""
    queue = ClassQueue()
    requests = [Request(name, 0, 1.0) for name in "abc"]
    queue.prepend_requests(requests)
    queue.remove_request(requests[1])
    assert names(queue) == ["a", "c"]
