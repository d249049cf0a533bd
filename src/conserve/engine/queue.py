"""The waiting queue: online before offline requests, each kind in order, cheap at any length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

from sortedcontainers import SortedKeyList

from conserve.engine.door import Request, RequestQueue, RequestStatus

SCHEDULABLE = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
"""Waiting for nothing but the scheduler."""


def is_online(request: Any) -> bool:
    """vLLM's priority 0 and below is interactive; larger is later, and offline."""
    return bool(request.priority <= 0)


def _no_wait(request: Any) -> float:
    """vLLM's own order."""
    return 0.0


def _place(request: Any, wait_s: float) -> tuple[int, float, str]:
    return (request.priority, request.arrival_time + wait_s, request.request_id)


class ClassQueue(RequestQueue):  # type: ignore[misc]
    """vLLM's priority order (priority, arrival, id), split by class; in place of its arrival,
    when it would like its first token.

    Adding, removing and looking at the head cost O(log n), so that a backlog of 100,000
    offline requests costs the online ones nothing. A request that comes back (preempted,
    skipped) regains its place.
    """

    def __init__(self, wait_s: Callable[[Request], float] = _no_wait) -> None:
        """`wait_s`: how long after its arrival a request would like its first token."""
        self._wait_s = wait_s
        self._places: dict[object, tuple[int, float, str]] = {}
        """Of those in it. What a request's place comes from may change meanwhile: a session with
        more input has arrived anew."""
        place_of = self._places.__getitem__
        self.online: Any = SortedKeyList(key=place_of)
        self.offline: Any = SortedKeyList(key=place_of)

    def _list(self, request: Request) -> Any:
        return self.online if is_online(request) else self.offline

    def offline_head(self, count: int) -> list[Any]:
        return list(islice(self.offline, count))

    def offline_oldest(self) -> Iterator[Any]:
        """Of each priority of offline requests those that came first, up to the first that has no
        output: none waits longer than all of these, but for what targets of their own let others
        overtake it by."""
        index = 0
        while index < len(self.offline):
            request = self.offline[index]
            yield request
            if request.num_output_tokens:
                index += 1
            else:
                index = self.offline.bisect_key_left((request.priority, math.inf, ""))

    def add_request(self, request: Request) -> None:
        self._places[request] = _place(request, self._wait_s(request))
        self._list(request).add(request)

    def peek_request(self) -> Request:
        """The first request; raises IndexError on an empty queue."""
        return self.online[0] if self.online else self.offline[0]

    def pop_request(self) -> Request:
        """Remove and return the first request; raises IndexError on an empty queue."""
        request = (self.online or self.offline).pop(0)
        del self._places[request]
        return request

    def prepend_request(self, request: Request) -> None:
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.add_request(request)

    def remove_request(self, request: Request) -> None:
        """Raises ValueError if it is not queued."""
        if request not in self:
            raise ValueError(f"{request.request_id} is not in list")
        self._list(request).remove(request)
        del self._places[request]

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Those that are not queued are passed over, as in vLLM's own queues."""
        for request in requests:
            if request in self:
                self.remove_request(request)

    def __contains__(self, request: object) -> bool:
        return request in self._places

    def __bool__(self) -> bool:
        return bool(self.online) or bool(self.offline)

    def __len__(self) -> int:
        return len(self.online) + len(self.offline)

    def __iter__(self) -> Iterator[Request]:
        return chain(self.online, self.offline)
