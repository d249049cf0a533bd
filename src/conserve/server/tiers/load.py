"""vLLM's count of requests in flight, which `/load` says, without those that are offline."""

from __future__ import annotations

from typing import Any


class Uncounted:
    """Takes one request out of the count, in which vLLM keeps it until its response has been sent.
    Without `--enable-server-load-tracking` there is none."""

    def __init__(self, state: Any) -> None:
        """`state`: of vLLM's app."""
        self._state = state
        self._taken_out = 0

    def take_out(self) -> None:
        if getattr(self._state, "enable_server_load_tracking", False):
            self._taken_out = 1
            self._add(-1)

    def put_back(self) -> None:
        """To be called once vLLM counts the request no more."""
        self._add(self._taken_out)
        self._taken_out = 0

    def _add(self, number: int) -> None:
        if number:
            counted = getattr(self._state, "server_load_metrics", 0)
            self._state.server_load_metrics = counted + number
