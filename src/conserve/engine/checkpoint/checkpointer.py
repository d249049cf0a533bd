"""Checkpoints as the scheduler sees them: what is on the host, on its way there, or coming back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from conserve.core.checkpointing import copy_is_quicker
from conserve.core.latency import LatencyModel
from conserve.engine.checkpoint import figures
from conserve.engine.checkpoint.bandwidth import Bandwidth
from conserve.engine.checkpoint.conversations import Conversations
from conserve.engine.checkpoint.orders import Ended, Job, Orders, Report
from conserve.engine.checkpoint.pool import Held, HostPool, Worth
from conserve.engine.checkpoint.ranks import RankPools
from conserve.engine.checkpoint.refusals import Refusals
from conserve.engine.checkpoint.tail import Tail
from conserve.engine.checkpoint.under_way import BlockIds, Holds, Sent, UnderWay
from conserve.engine.door import init_logger
from conserve.engine.queue import is_online
from conserve.engine.speculation import num_settled
from conserve.engine.stats import EngineStats

logger = init_logger("vllm.conserve")


class Checkpointer:
    """Turns the policy's wishes into orders for the workers, and their reports into coverage.

    A request's blocks may be given away at once: `leaves` and `finished` see to it that the
    next step's orders end every copy in or out of them before that step's forward.
    """

    def __init__(
        self,
        pool: HostPool,
        bandwidth: Bandwidth,
        *,
        num_ranks: int,
        incremental: bool = True,
        stats: EngineStats | None = None,
        unusable: str = "",
        conversations: Conversations | None = None,
    ) -> None:
        """pool: of its kind, and without room until the ranks have reported theirs."""
        self.pool = pool
        self.bandwidth = bandwidth
        self.stats = stats if stats is not None else EngineStats()
        self.conversations = conversations
        """None where nothing is kept of online requests."""
        self.unusable = unusable
        """Why nothing is kept, here or on a worker; empty where checkpoints are kept."""
        self.hold_still = False
        """Set while steps are timed."""
        self._ranks = RankPools(num_ranks, bandwidth)
        self.restoring: Mapping[str, int] = {}
        """request_id -> leading tokens that the step under construction brings back."""
        self.incremental = incremental
        self.holds: Holds = lambda *_: True
        """Whether a running request's window has not left a block of a KV group's."""
        self.under_way = UnderWay()
        self._orders = Orders()
        self._loaded: list[tuple[str, bool]] = []
        self.refusals = Refusals()

    @property
    def is_ready(self) -> bool:
        """Every rank has its pool. Until then nothing is copied."""
        return not self.unusable and self._ranks.all_there

    def num_coming_tokens(self, request_id: str) -> int:
        """Leading tokens on the host once the stores under way are done. None of a checkpoint that
        was lost: stores may still be under way into slots that are no longer its own."""
        if self.pool.get(request_id) is None:
            return 0
        stores = self.under_way.of(request_id, store=True)
        ends = [sent.num_tokens for sent in stores if not sent.dropped]
        return max([self.pool.num_covered_tokens(request_id), *ends])

    # Copies to the host

    def checkpoint(
        self,
        request: Any,
        num_tokens: int,
        block_ids: BlockIds,
        worth: Worth,
        *,
        leaves: bool = False,
    ) -> Job | None:
        """Queue what is missing of the request's first `num_tokens` tokens, if there is room, and
        of a window what it has not left; if it `leaves`, recurrent state, too. They must be in its
        blocks when the next step's forward begins, on every rank."""
        name, start = request.request_id, self.num_coming_tokens(request.request_id)
        refused = self.refusals.holds(name, self.pool.num_used_slots)
        if not leaves and (refused or num_tokens <= start):
            return None
        online, hashes = is_online(request), request.block_hashes
        held = Held.of(self.pool.groups, request.num_computed_tokens, start)
        if not self.pool.grow(name, num_tokens, hashes, worth, online=online, held=held):
            self.refusals.add(name, self.pool.num_used_slots)
            return None
        start = self.num_coming_tokens(name)
        spans = self.pool.spans(name, start, num_tokens) if start < num_tokens else []
        if leaves and not self.pool.states.has(name, num_tokens):
            spans += self.pool.states.take(name, num_tokens)
        if not spans:
            return None
        sent = self._send(self.under_way.begin(request, num_tokens, spans, block_ids, store=True))
        sent.job.ranges.extend((span.start, span.stop) for span in spans)
        sent.oldest = {s.group: s.index for s in reversed(spans) if s.group in self.pool.windows}
        return sent.job

    def _send(self, sent: Sent) -> Sent:
        self.pool.pin(sent.request.request_id)
        self._orders.jobs.append(sent.job)
        return sent

    # Blocks that change hands

    def num_covered_tokens(self, request: Any) -> int:
        """Computed tokens of the request whose KV lies on the host."""
        covered = self.pool.num_covered_tokens(request.request_id)
        return min(covered, int(request.num_computed_tokens))

    def leaves(self, request: Any, block_ids: BlockIds, worth: Worth, model: LatencyModel) -> None:
        """The request's blocks go to others, after this call. What the host lacks of it is
        copied before, if that is quicker than computing it again; else copies end as they are."""
        name, computed = request.request_id, num_settled(request)
        tail, rate = Tail.of(self.pool, name, computed), self.bandwidth.store_tokens_per_s
        wait = not self.incremental or copy_is_quicker(*tail, model, rate)
        if tail.lost_tokens and wait and self.is_ready:
            self.checkpoint(request, computed, block_ids, worth, leaves=True)
            self._orders.wait.extend(s.job.number for s in self.under_way.of(name, store=True))
            return
        self.drop_copies(name)
        self.pool.drop_if_short(name, self.num_covered_tokens(request))

    def _end_behind_windows(self) -> None:
        """vLLM has scheduled a step, and given away blocks that the windows of running requests
        have left. Copies out of those end, and what was to follow them."""
        for name in self.under_way.left_behind(self.holds):
            self._end(self.under_way.of(name, store=True))

    def drop_copies(self, request_id: str) -> None:
        """The request's blocks go to others after this call, and no copy out of them is waited
        for."""
        self._drop(s for s in self.under_way.of(request_id, store=True) if not s.dropped)

    def _drop(self, sent: Iterable[Sent]) -> None:
        """Their blocks change hands, and they count for nothing."""
        dropped = list(sent)
        for one in dropped:
            one.dropped = True
        self._end(dropped)

    def _end(self, sent: Iterable[Sent]) -> None:
        """Their blocks change hands: they are not begun, nor gone on with. One that is done by
        then counts."""
        for one in sent:
            self._orders.drop.append(one.job.number)
            self._orders.wait.append(one.job.number)

    def finished(self, request: Any) -> None:
        """The request is done, or was cancelled; its blocks go to others after this call."""
        name = request.request_id
        self.refusals.forget(name)
        stores, loads = (self.under_way.of(name, store=store) for store in (True, False))
        self._drop(loads)
        if self.conversations is None or self.hold_still or not is_online(request):
            self._drop(stores)
            self.pool.drop(name)
            return
        for sent in (*stores, *loads):
            sent.outlived = True
        self._end(stores)
        self.conversations.ended(request, self.pool)

    def forget_all(self) -> None:
        """What is on the host, or on its way, is worth nothing any more: the weights may have
        changed. No load may be under way that its request still waits for."""
        self._drop(sent for sent in self.under_way if not sent.dropped)
        self.refusals.clear()
        self.pool.forget_all()
        if self.conversations is not None:
            self.conversations.forget()

    # Copies back

    def adopt(self, request: Any, num_tokens: int, worth: Worth) -> None:
        """Have what others left of the request's leading tokens, before it is brought back."""
        self.pool.adopt(request.request_id, num_tokens, request.block_hashes, worth)

    def num_restored_tokens(self, request_id: str) -> int:
        """Leading tokens that this step's plan brings back, as far as they are still there: a
        copy queued since the plan was made may have needed the room."""
        planned = self.restoring.get(request_id, 0)
        num_tokens = min(planned, self.num_coming_tokens(request_id))
        return self.pool.num_restorable_tokens(request_id, num_tokens)

    def load(self, request: Any, num_loaded: int, block_ids: BlockIds) -> None:
        """Fill the request's blocks with the last `num_loaded` of the tokens to be restored."""
        name = request.request_id
        num_tokens = self.num_restored_tokens(name)
        places = self.pool.places(name, num_tokens - num_loaded, num_tokens)
        sent = self.under_way.begin(request, num_tokens, places, block_ids, store=False)
        sent.brings = figures.by_source(self.pool, self._send(sent).job.slots, num_loaded)

    def is_loading(self, request_id: str) -> bool:
        return any(not sent.dropped for sent in self.under_way.of(request_id, store=False))

    def stop_load(self, request_id: str) -> None:
        """The blocks being filled go to others after this call."""
        self._drop(self.under_way.of(request_id, store=False))
        self._loaded = [(name, whole) for name, whole in self._loaded if name != request_id]

    def take_loaded(self) -> list[tuple[str, bool]]:
        """Requests whose load has ended since the last call, and whether all of it arrived."""
        loaded, self._loaded = self._loaded, []
        return loaded

    def gauge(self) -> None:
        """Report how full the pool is, and who had to go since the last call."""
        figures.gauge(self.stats, self.pool, self.bandwidth.token_bytes * self._ranks.num_ranks)

    # To the workers and back

    def take_orders(self) -> Orders:
        """Of the step that vLLM has scheduled, all of it."""
        self._end_behind_windows()
        orders, self._orders = self._orders, Orders()
        orders.moves.extend(self.pool.take_moves())
        orders.num_slots = self.pool.num_slots if self.is_ready else 0
        orders.hold_still = self.hold_still
        orders.give_back = bool(self.unusable)
        return orders

    def take(self, report: Report) -> None:
        """What the workers of one step report together."""
        if report.unusable and not self.unusable:
            self._give_up(report.unusable)
        if self.unusable:
            return
        if report.pools and not self.is_ready:
            self._ranks.add(report.pools, report.bytes_per_s)
            if self.is_ready:
                self.pool = self._ranks.together(self.pool)
        if report.wait_s:
            self.stats.observe("copy_wait_seconds", report.wait_s)
        if report.lost_slots:
            self._lose(report.lost_slots, "move")
        for number, ended in report.ended.items():
            sent = self.under_way.get(number)
            if sent is not None:
                self._ended(sent, ended)

    def _give_up(self, why: str) -> None:
        """Copies under way end before the next step's forward: its orders say so."""
        self.unusable = why
        loads = [sent for sent in self.under_way if not (sent.job.store or sent.dropped)]
        self._loaded += [(sent.request.request_id, False) for sent in loads]
        self.under_way.clear()
        self._orders = Orders()
        self.pool = self.pool.of_size(0)
        logger.warning("ConServe: checkpoints: off: %s; displaced requests compute again", why)

    def _ended(self, sent: Sent, ended: Ended) -> None:
        sent.ended.add(ended)
        if sent.ended.num_ranks < self._ranks.num_ranks:
            return
        self.under_way.remove(sent)
        figures.count_copy(self.stats, sent.ended, store=sent.job.store)
        failed = sent.ended.failed_slots
        whole = not (sent.dropped or sent.ended.dropped or failed)
        name, hashes = sent.request.request_id, sent.request.block_hashes
        self.refusals.forget(name)
        self.pool.unpin(name)
        if sent.job.store:
            self._stored(sent, whole)
        else:
            self.bandwidth.loaded(sent.ended.num_bytes / self._ranks.num_ranks, sent.ended.seconds)
            if not sent.dropped:
                self._loaded.append((name, whole))
            if whole:
                figures.count_restore(self.stats, sent.brings, online=is_online(sent.request))
        if sent.outlived:
            self.pool.keep(name, hashes)
        if failed:
            self._lose(failed, "store" if sent.job.store else "load")

    def _stored(self, sent: Sent, whole: bool) -> None:
        name, hashes = sent.request.request_id, sent.request.block_hashes
        covered = self.pool.num_covered_tokens(name)
        if whole:
            self.pool.written(name, sent.num_tokens, hashes)
            if not is_online(sent.request):
                newly = self.pool.num_covered_tokens(name) - covered
                self.stats.count("checkpointed_tokens", max(0, newly))
            return
        self.pool.states.lose(name, sent.num_tokens)
        if not sent.dropped:
            self.drop_copies(name)

    def _lose(self, slots: set[int], doing: str) -> None:
        losers = self.pool.lose(slots)
        self.stats.count("checkpoint_faults", 1, doing)
        logger.warning(
            "ConServe: a checkpoint %s failed; recomputing %s", doing, ", ".join(losers) or "nobody"
        )
