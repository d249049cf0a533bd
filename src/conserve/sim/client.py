"""Who sends the requests: it makes them from the workload's plans, and remembers them."""

from __future__ import annotations

from collections.abc import Iterable

from conserve.sim.request import SimRequest
from conserve.workload import RequestPlan


class Client:
    """Requests reach an engine `frontend_s` after they were sent."""

    def __init__(self, offline: Iterable[RequestPlan], frontend_s: float) -> None:
        self.sent: list[SimRequest] = []
        self._offline = iter(offline)
        self._frontend_s = frontend_s

    def send(self, plan: RequestPlan, sent_s: float) -> SimRequest:
        request = SimRequest.of(plan, sent_s + self._frontend_s)
        self.sent.append(request)
        return request

    def next_offline(self, now_s: float) -> list[SimRequest]:
        """The next of the offline queue; none when it is empty."""
        plan = next(self._offline, None)
        return [] if plan is None else [self.send(plan, now_s)]
