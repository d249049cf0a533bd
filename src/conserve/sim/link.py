"""The link to host memory: copies that the plan asks for on their way there, and restores back."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from msgspec import Struct

from conserve.core.blocks import blocks_cost
from conserve.core.checkpointing import COPY_SHARE, copy_budget, copy_is_quicker, least_tail
from conserve.core.latency import LatencyModel
from conserve.sim.cost import Machine
from conserve.sim.request import Phase, SimRequest


class Copy(Struct, eq=False):
    """Of one request, to the host. A struct, which is made in a third of a dataclass's time: there
    are some in every step."""

    request: SimRequest | None
    """None if it does not count any more."""
    end: int
    """Leading tokens that it makes whole there."""
    cost: int
    """Tokens' worth of its blocks."""
    done_s: float = math.inf
    """When it will have arrived, once it is on the link."""


class Load(NamedTuple):
    """A restore that is on the link, and when it will be there."""

    done_s: float
    request: SimRequest


class HostLink:
    """One queue for both directions, carried at `link_bytes_per_s`. Stricter than the engine, in
    which forwards wait for less: what is on the link is carried in its order to its end, whoever
    still wants it.

    Orders of a plan begin with its step (`begin`). Whole blocks are carried. The host pool is
    unbounded; a step is slowed down only by the copies that it has to wait for. Without a link
    nothing is copied.
    """

    def __init__(self, machine: Machine) -> None:
        tokens_per_s = 0.0
        if machine.link_bytes_per_s:
            tokens_per_s = machine.link_bytes_per_s / machine.kv_bytes_per_token
        self.tokens_per_s = tokens_per_s
        self.copy_tail = least_tail(machine.block_size) if tokens_per_s else 1
        self.num_checkpointed_tokens = 0
        self.num_restored_tokens = 0
        self._block_size = machine.block_size
        self._token_s = 1 / tokens_per_s if tokens_per_s else 0.0
        self._open: list[Copy] = []
        """What the plan that is being applied orders."""
        self._orders: list[Copy] = []
        """What a plan ordered whose step has not begun."""
        self._copies: deque[Copy] = deque()
        """What is on the link, in the order in which it will arrive."""
        self.num_queued_tokens = 0
        """Tokens' worth of all these."""
        self._loads: dict[SimRequest, int] = {}
        """Tokens' worth of the restores that are not over."""
        self._load_orders: list[SimRequest] = []
        self._leaving: set[SimRequest] = set()
        """Whose copies the next step has to wait for."""
        self._free_s = -math.inf
        """When the link will have carried all that is on it."""
        self._wait_s = -math.inf
        """When the step that begins next may write to the blocks that were given away to it."""
        self._next_wait_s = -math.inf
        """The same of the step after that."""
        self._asked_s: float | None = None

    # What the policy sees

    def copy_tokens(self, now_s: float) -> int:
        """What may be queued now. Call once a plan: it earns the time since the last one."""
        self.advance(now_s)
        asked_s, self._asked_s = self._asked_s, now_s
        if asked_s is None:
            return 0
        return int(
            copy_budget(now_s - asked_s, COPY_SHARE * self.tokens_per_s, self.num_queued_tokens)
        )

    @property
    def restore_queue_s(self) -> float:
        return sum(self._loads.values()) * self._token_s

    def advance(self, now_s: float) -> None:
        """Note the copies that have arrived by now."""
        copies, running = self._copies, Phase.RUNNING
        while copies and copies[0].done_s <= now_s:
            copy = copies.popleft()
            self.num_queued_tokens -= copy.cost
            request = copy.request
            if request is None:
                continue
            self.num_checkpointed_tokens += copy.end - request.num_landed_tokens
            request.num_landed_tokens = copy.end
            if request.phase is running:
                request.num_checkpointed_tokens = copy.end

    # What the plan asks for

    def order(self, wanted: Mapping[str, int], live: Mapping[str, SimRequest]) -> None:
        """Copy what is missing of each request's first so many tokens."""
        size, orders, queued = self._block_size, self._open, 0
        for request_id, end in wanted.items():
            request = live[request_id]
            start = request.num_copying_tokens
            if end > start:
                cost = blocks_cost(start - start % size, end, size)
                request.num_copying_tokens = end
                orders.append(Copy(request, end, cost))
                queued += cost
        self.num_queued_tokens += queued

    def leaves(self, request: SimRequest, model: LatencyModel | None) -> None:
        """The request's blocks go to others. What the host lacks of it is copied before, if that
        is quicker than computing it again; else what is under way does not count any more."""
        if not self.tokens_per_s:
            return
        computed = request.num_computed_tokens
        covered = min(request.num_landed_tokens, computed)
        lacking = computed - covered
        copied = blocks_cost(0, lacking, self._block_size)
        if (
            lacking
            and model
            and copy_is_quicker(copied, lacking, covered, model, self.tokens_per_s)
        ):
            self.order({request.request_id: computed}, {request.request_id: request})
            self._leaving.add(request)
        elif request.num_copying_tokens > request.num_landed_tokens:
            self._drop(request)
        # A restore would be queued behind the copies under way.
        request.num_checkpointed_tokens = request.num_copying_tokens

    def finished(self, request: SimRequest) -> None:
        if request.num_copying_tokens > request.num_landed_tokens:
            self._drop(request)

    def _drop(self, request: SimRequest) -> None:
        """The request's copies do not count any more. Those of a plan that has been applied are
        carried nevertheless, and the next plan's step waits for them."""
        for copy in self._copies:
            if copy.request is request:
                copy.request = None
                self._next_wait_s = max(self._next_wait_s, copy.done_s)
        for copy in self._orders:
            if copy.request is request:
                copy.request = None
        self.num_queued_tokens -= sum(copy.cost for copy in self._open if copy.request is request)
        self._open = [copy for copy in self._open if copy.request is not request]
        request.num_copying_tokens = request.num_landed_tokens

    def load(self, request: SimRequest, start: int, end: int) -> None:
        """Bring [start, end) back into the request's blocks; `start` begins a block."""
        self._loads[request] = blocks_cost(start, end, self._block_size)
        self._load_orders.append(request)
        self.num_restored_tokens += end - start

    def loaded(self, request: SimRequest) -> None:
        del self._loads[request]

    # The link itself

    @property
    def has_orders(self) -> bool:
        return bool(self._orders or self._load_orders)

    def close_orders(self) -> None:
        """The plan is applied: its orders go with its step, and nothing takes them back."""
        self._orders += self._open
        self._open = []
        self._wait_s = max(self._wait_s, self._next_wait_s)
        self._next_wait_s = -math.inf

    def begin(self, now_s: float) -> tuple[float, list[Load]]:
        """Put the orders on the link, as their step begins. Returns when its forward may begin,
        which may write to blocks that were given away, and when which restores will be there."""
        ready_s, free_s = max(now_s, self._wait_s), max(now_s, self._free_s)
        copies, token_s, leaving = self._copies, self._token_s, self._leaving
        if leaving:
            ready_s = max([ready_s, *(copy.done_s for copy in copies if copy.request in leaving)])
        for copy in self._orders:
            free_s += copy.cost * token_s
            copy.done_s = free_s
            if copy.request is None:
                self._next_wait_s = max(self._next_wait_s, free_s)
            elif copy.request in leaving:
                ready_s = max(ready_s, free_s)
        copies.extend(self._orders)
        loads = []
        for request in self._load_orders:
            free_s += self._loads[request] * token_s
            loads.append(Load(free_s, request))
        self._free_s, self._wait_s = free_s, ready_s
        self._orders.clear()
        self._load_orders.clear()
        leaving.clear()
        return ready_s, loads
