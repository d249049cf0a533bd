"""Where each request is and which blocks it has: queues, running requests, what is restored."""

from __future__ import annotations

from bisect import insort_right
from collections import deque
from collections.abc import Callable, Container, Iterable
from itertools import islice

from conserve.core.blocks import blocks_for
from conserve.core.latency import LatencyModel
from conserve.core.sharing import num_lasting
from conserve.core.snapshot import OFFLINE_HEAD
from conserve.sim.cost import Machine
from conserve.sim.counters import Counters
from conserve.sim.link import HostLink
from conserve.sim.memory import BlockPool
from conserve.sim.request import Phase, SimRequest


def _ignore(request: SimRequest) -> None:
    """Nobody wants to know."""


def _arrival_s(request: SimRequest) -> float:
    return request.arrival_s


class Places:
    """Every change of a request's phase and of a block's owner happens here."""

    def __init__(self, machine: Machine, *, class_aware: bool = True) -> None:
        self.machine = machine
        self.pool = BlockPool(machine.num_blocks, machine.block_size, class_aware=class_aware)
        self.link = HostLink(machine)
        self.live: dict[str, SimRequest] = {}
        self.running: list[SimRequest] = []
        self.restoring: list[SimRequest] = []
        """Their KV is on the way back into their blocks; the policy is not shown them."""
        self.holding: list[SimRequest] = []
        """Those whose KV is back, and who wait with their blocks; by arrival."""
        self.waiting_online: deque[SimRequest] = deque()
        self.waiting_offline: deque[SimRequest] = deque()
        self.first_due_s: Callable[[SimRequest], float] = _arrival_s
        """The order of the queues, each of one class."""
        self.num_online = 0
        """Online requests that wait or run."""
        self.counters = Counters()
        self._mixed = False
        """Whether an online request may stand behind an offline one in `running`."""
        self.admits: Callable[[SimRequest], None] = _ignore
        """Told of each request that leaves the queue for the first time."""
        self.lets_go: Callable[[SimRequest], None] = _ignore
        """Told of each that is about to free its blocks."""
        self._telling: list[SimRequest] = []
        """Those with KV in their blocks and texts that others may begin with."""

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
        insort_right(self._queue_of(request), request, key=self.first_due_s)
        self.num_online += request.online

    def note_found(self, waiting: Iterable[SimRequest]) -> None:
        """What waiting requests need not compute: what they hold, or KV still in blocks (which the
        engine looks for only as far as one step's tokens reach)."""
        most = self.machine.max_step_tokens
        for request in waiting:
            request.num_borrowed_blocks = 0
            if not request.num_blocks:
                found = 0
                if most > 0 and (request.num_lost_tokens or request.text.shared):
                    found = self._num_found(request)
                request.num_computed_tokens = found * self.machine.block_size
                if found:
                    borrowed = self.pool.num_in_use(request.text, self._most_found(request))
                    request.num_borrowed_blocks = borrowed
            most -= request.num_tokens - request.num_computed_tokens

    def _num_found(self, request: SimRequest) -> int:
        """Leading blocks whose KV a waiting request finds: that of others, or what is left of its
        own. One token is computed in any case."""
        if not request.text.shared and not request.num_lost_tokens:
            return 0
        self._tell()
        return self.pool.find(request.text, self._most_found(request))

    def _most_found(self, request: SimRequest) -> int:
        return (request.num_tokens - 1) // self.machine.block_size

    def _tell(self) -> None:
        """What is computed of texts that others may begin with can be found, from the moment on at
        which its step is scheduled, as far as its tokens are known."""
        for request in self._telling:
            known = request.num_prompt_tokens + len(request.token_times_s)
            known = min(request.num_computed_tokens, known)
            self.pool.name(request.request_id, request.text, known // self.machine.block_size)

    def put_online_first(self) -> None:
        """Blocks are granted in the order of `running`; offline requests come last."""
        if self._mixed:
            self._mixed = False
            self.running.sort(key=lambda request: not request.online)

    # Out of the queue

    def has_room(self, request: SimRequest) -> bool:
        """Whether a slot is free, and blocks for all known tokens of a waiting request."""
        need = blocks_for(request.num_tokens, self.machine.block_size) - request.num_blocks
        need -= self.num_in_use(request)
        return self.num_free_slots > 0 and need <= self.pool.num_free_blocks

    def num_in_use(self, request: SimRequest) -> int:
        """Blocks that a waiting request finds and others hold: they cost no free one."""
        if not request.text.shared or request.num_blocks:
            return 0
        self._tell()
        return self.pool.num_in_use(request.text, self._most_found(request))

    def num_lasting(self, request: SimRequest) -> int:
        """Of those, the ones that a running online request holds."""
        found = self.pool.found(request.text, self._most_found(request))
        online = (r.request_id for r in self.running if r.online)
        return num_lasting(found, ((block for block, _ in self.pool.table(r)) for r in online))

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
        found = 0
        if self._num_found(request):
            most = self._most_found(request)
            found = self.pool.claim(request.request_id, request.text, most)
        found_tokens = found * self.machine.block_size
        request.num_blocks, request.num_found_tokens = found, found_tokens
        if request.num_cached_tokens is None:
            request.num_cached_tokens = found_tokens
            self.admits(request)
        self.counters.reclaimed_tokens += min(found_tokens, request.num_lost_tokens)
        return found_tokens

    def hold(self, request: SimRequest, end: int) -> None:
        """Blocks up to token `end`, from the free ones."""
        need = blocks_for(end, self.machine.block_size) - request.num_blocks
        if need > 0:
            self.give(request, need)

    def give(self, request: SimRequest, num_blocks: int) -> None:
        """So many of the free blocks."""
        self.pool.take(request.request_id, num_blocks)
        request.num_blocks += num_blocks

    def run(self, request: SimRequest) -> None:
        request.move(Phase.RUNNING)
        request.num_checkpointed_tokens = request.num_landed_tokens
        self.running.append(request)
        if request.text.shared and request not in self._telling:
            self._telling.append(request)
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
        if request.text.shared:
            self._telling.append(request)

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

    def nothing_came(self, names: Container[str]) -> None:
        """Of a stopped step with those requests in it: what it was to compute is found no more, and
        who was admitted on it waits again."""
        size, gone = self.machine.block_size, set[int]()
        stopped = [r for r in self._telling if r.request_id in names]
        for request in stopped:
            gone.update(self.pool.unname(request.request_id, request.num_computed_tokens // size))
        for request in stopped if gone else ():
            full = request.num_computed_tokens // size
            if self.pool.holds_any(request.request_id, full, gone):
                self._wait_anew(request)

    def _wait_anew(self, request: SimRequest) -> None:
        self.running.remove(request)
        request.move(Phase.WAITING)
        request.num_computed_tokens = 0
        self._wait_without_blocks(request)

    def _wait_without_blocks(self, request: SimRequest) -> None:
        computed = request.num_computed_tokens
        if computed > request.num_found_tokens:
            # Else no step of its own ran to its end since, and nothing that it did is lost.
            request.num_lost_tokens = max(request.num_lost_tokens, computed)
        self._free(request, waits=True)
        request.num_blocks = request.num_computed_tokens = 0
        insort_right(self._queue_of(request), request, key=self.first_due_s)

    def _free(self, request: SimRequest, *, waits: bool) -> None:
        """Its blocks go; it will wait for others or has ended."""
        self.lets_go(request)
        if request in self._telling:
            self._telling.remove(request)
        full = request.num_computed_tokens // self.machine.block_size
        text = request.text if waits or request.text.shared else None
        reaches = None if request.online else self._reaches(request, waits=waits)
        self.pool.free(request.request_id, full, text, reaches)

    def _reaches(self, request: SimRequest, *, waits: bool) -> list[int]:
        """How many of its leading blocks the head of the offline queue begins with, each; and it
        itself, if it will wait."""
        size = self.machine.block_size
        full = request.num_tokens // size
        own = [full] if waits else []
        if not request.text.shared:
            return own
        head = islice(self.waiting_offline, OFFLINE_HEAD)
        reaches = (
            request.text.num_common(r.text, min(full, r.num_tokens // size), size) for r in head
        )
        return own + [reach for reach in reaches if reach]

    def finish(self, request: SimRequest) -> None:
        if request.phase is Phase.RUNNING:
            self.running.remove(request)
            self._free(request, waits=False)
        else:
            # It was displaced while its last token was in flight.
            self._queue_of(request).remove(request)
        self.link.finished(request)
        request.num_blocks = 0
        request.move(Phase.FINISHED)
        self.num_online -= request.online
        del self.live[request.request_id]
