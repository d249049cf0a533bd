"""Where each request is and which blocks it has: queues, running requests, what is restored."""

from __future__ import annotations

from bisect import insort_right
from collections import deque
from collections.abc import Iterable
from itertools import takewhile

from conserve.core.blocks import blocks_for
from conserve.core.free_order import ONLINE
from conserve.core.latency import LatencyModel
from conserve.sim.cost import Machine
from conserve.sim.counters import Counters
from conserve.sim.link import HostLink
from conserve.sim.memory import RETURNS, BlockPool
from conserve.sim.request import Phase, SimRequest


class Places:
    """Every change of a request's phase and of a block's owner happens here."""

    def __init__(
        self, machine: Machine, *, prefix_caching: bool = True, class_aware: bool = True
    ) -> None:
        self.machine = machine
        self.pool = BlockPool(
            machine.num_blocks, prefix_caching=prefix_caching, class_aware=class_aware
        )
        self.link = HostLink(machine)
        self.live: dict[str, SimRequest] = {}
        self.running: list[SimRequest] = []
        self.restoring: list[SimRequest] = []
        """Their KV is on the way back into their blocks; the policy is not shown them."""
        self.holding: list[SimRequest] = []
        """Those whose KV is back, and who wait with their blocks; by arrival."""
        self.waiting_online: deque[SimRequest] = deque()
        self.waiting_offline: deque[SimRequest] = deque()
        self.num_online = 0
        """Online requests that wait or run."""
        self.counters = Counters()
        self._mixed = False
        """Whether an online request may stand behind an offline one in `running`."""

    @property
    def num_free_slots(self) -> int:
        return self.machine.max_running - len(self.running)

    def _queue_of(self, request: SimRequest) -> deque[SimRequest]:
        return self.waiting_online if request.online else self.waiting_offline

    def arrive(self, request: SimRequest) -> None:
        """Queue a request. Raises ValueError if the machine could never finish it."""
        need = blocks_for(request.most_tokens, self.machine.block_size)
        if need > self.machine.num_blocks:
            raise ValueError(
                f"{request.request_id} needs {need} KV blocks and the machine has "
                f"{self.machine.num_blocks}: give it more memory, or shorten the request"
            )
        self.live[request.request_id] = request
        self._queue_of(request).append(request)
        self.num_online += request.online

    def note_found(self, waiting: Iterable[SimRequest]) -> None:
        """What waiting requests need not compute: what they hold, or KV still in freed blocks
        (which the engine looks for only as far as one step's tokens reach)."""
        size, most = self.machine.block_size, self.machine.max_step_tokens
        for request in waiting:
            if not request.num_blocks:
                found = self.pool.remembered_of(request.request_id) if most > 0 else 0
                longest = (request.num_tokens - 1) // size
                request.num_computed_tokens = min(found, longest) * size if found else 0
            most -= request.num_tokens - request.num_computed_tokens

    def put_online_first(self) -> None:
        """Blocks are granted in the order of `running`; offline requests come last."""
        if self._mixed:
            self._mixed = False
            self.running.sort(key=lambda request: not request.online)

    # Out of the queue

    def has_room(self, request: SimRequest) -> bool:
        """Whether a slot is free, and blocks for all known tokens of a waiting request."""
        need = blocks_for(request.num_tokens, self.machine.block_size) - request.num_blocks
        return self.num_free_slots > 0 and need <= self.pool.num_free_blocks

    def leave_queue(self, request: SimRequest) -> int:
        """Returns how many leading tokens it need not compute, as its blocks hold them."""
        if request.num_blocks:
            self.holding.remove(request)
            return request.num_computed_tokens
        queue = self._queue_of(request)
        if queue[0] is request:
            queue.popleft()
        else:
            queue.remove(request)
        size = self.machine.block_size
        found = self.pool.reclaim(request.request_id, (request.num_tokens - 1) // size)
        request.num_blocks = found
        self.counters.reclaimed_tokens += found * size
        return found * size

    def hold(self, request: SimRequest, end: int) -> None:
        """Blocks up to token `end`, from the free ones."""
        need = blocks_for(end, self.machine.block_size) - request.num_blocks
        if need > 0:
            self.pool.take(request.request_id, need)
            request.num_blocks += need

    def run(self, request: SimRequest) -> None:
        request.move(Phase.RUNNING)
        request.num_checkpointed_tokens = request.num_landed_tokens
        self.running.append(request)
        self._mixed |= request.online

    # There and back

    def restore(self, request: SimRequest, end: int) -> bool:
        """Bring a waiting request's first tokens up to `end` back. False: there is no room."""
        if not self.has_room(request):
            return False
        found = self.leave_queue(request)
        self.hold(request, end)
        self.link.load(request, found, end)
        request.num_computed_tokens = end
        request.move(Phase.RESTORING)
        self.restoring.append(request)
        return True

    def restored(self, request: SimRequest) -> None:
        """Its KV is back: it waits with its blocks, ahead of those without."""
        self.link.loaded(request)
        self.restoring.remove(request)
        request.move(Phase.WAITING)
        insort_right(self.holding, request, key=lambda r: r.arrival_s)

    def evict(self, request: SimRequest, model: LatencyModel | None) -> None:
        """Free a running request's blocks; it waits again, where its arrival places it."""
        self.running.remove(request)
        if not request.online:
            self.link.leaves(request, model)
        request.move(Phase.WAITING)
        self._wait_without_blocks(request)

    def give_back(self, request: SimRequest) -> None:
        """Take the blocks from a request that waits with them."""
        self.holding.remove(request)
        self._wait_without_blocks(request)

    def _wait_without_blocks(self, request: SimRequest) -> None:
        queue = self._queue_of(request)
        earlier = (r.arrival_s <= request.arrival_s for r in queue)
        queue.insert(sum(takewhile(bool, earlier)), request)
        computed = request.num_computed_tokens
        request.num_lost_tokens = max(request.num_lost_tokens, computed)
        whole, rank = computed // self.machine.block_size, ONLINE if request.online else RETURNS
        self.pool.free(request.request_id, num_remembered=whole, rank=rank)
        request.num_blocks = request.num_computed_tokens = 0

    def finish(self, request: SimRequest) -> None:
        if request.phase is Phase.RUNNING:
            self.running.remove(request)
            whole = request.num_computed_tokens // self.machine.block_size
            rank = ONLINE if request.online else 0
            self.pool.free(request.request_id, num_remembered=whole, rank=rank)
        else:
            # It was displaced while its last token was in flight.
            self._queue_of(request).remove(request)
            self.pool.reclaim(request.request_id, 0)
        self.link.finished(request)
        request.num_blocks = 0
        request.move(Phase.FINISHED)
        self.num_online -= request.online
        del self.live[request.request_id]
