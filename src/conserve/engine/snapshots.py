"""The engine between two steps, as the policy is told of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from conserve.core.blocks import UNCOUNTED
from conserve.core.kv_groups import KVGroups
from conserve.core.learning import Experience
from conserve.core.snapshot import OFFLINE_HEAD, RequestView, Snapshot
from conserve.engine.checkpoint.host_view import HostView
from conserve.engine.needs import capacity_of, describe_media
from conserve.engine.pausing import admits_new
from conserve.engine.promises import Promises
from conserve.engine.queue import SCHEDULABLE, is_online
from conserve.engine.remembering import Remembering
from conserve.engine.scheduler_view import SchedulerView
from conserve.engine.shared_blocks import SharedBlocks
from conserve.engine.speculation import Drafting, with_drafts
from conserve.engine.tracker import RequestTracker


class Snapshots:
    """Takes them. Changes nothing but the tracker's views."""

    def __init__(
        self,
        scheduler: SchedulerView,
        promises: Promises,
        tracker: RequestTracker,
        experience: Experience,
        host: HostView,
        remembering: Remembering,
        groups: KVGroups | None = None,
        drafting: Drafting | None = None,
    ) -> None:
        self._drafting = drafting or Drafting()
        self.decode_width = 1 + self._drafting.num_tokens
        self._scheduler = scheduler
        self._promises = promises
        self._tracker = tracker
        self._experience = experience
        self._host = host
        self._remembering = remembering
        self._groups = groups
        self._sharing = SharedBlocks(scheduler, groups)

    def online_resident(self) -> bool:
        """Whether an online request runs, or waits for more than blocks of its own."""
        if self._new_online() or any(is_online(r) for r in self._scheduler.running):
            return True
        held = self._scheduler.kv_holding_waiting
        return self._host.num_loading(r for r in held if is_online(r)) > 0

    def _new_online(self) -> Sequence[Any]:
        """Those without blocks that may be admitted."""
        return self._scheduler.waiting.online if admits_new(self._scheduler) else ()

    def take(self, now_s: float, *, can_stop: bool) -> Snapshot:
        """Good until the next step is scheduled. Call once a step: it spends the copies' budget."""
        scheduler, host = self._scheduler, self._host
        traffic = self._experience.traffic
        # vLLM keeps those that hold blocks (their KV was loaded) apart, and admits them first.
        held = list(scheduler.kv_holding_waiting)
        held_online = [r for r in held if is_online(r)]
        held_offline = [r for r in held if not is_online(r)]
        head = scheduler.waiting.offline_head(OFFLINE_HEAD if admits_new(scheduler) else 0)
        running = self._tracker.running(scheduler.running, scheduler.current_step + 1)
        waiting_offline = self._waiting_views(chain(held_offline, head))
        host.describe(running)
        host.describe_waiting(waiting_offline)
        waiting_online = self._waiting_views(chain(held_online, self._new_online()))
        host.describe_online(chain(running, waiting_online), scheduler.requests)
        host.pass_over_refused(running)
        describe_media(scheduler, chain(running, waiting_online, waiting_offline))
        num_free_slots = scheduler.max_num_active_reqs - len(scheduler.running)
        num_free_slots -= scheduler.num_waiting_for_streaming_input
        num_free_blocks = self._num_free_blocks()
        return Snapshot(
            now_s=now_s,
            running=running,
            waiting_online=waiting_online,
            waiting_offline=waiting_offline,
            num_free_blocks=num_free_blocks,
            num_free_slots=num_free_slots,
            block_size=host.block_size if self._groups else scheduler.block_size,
            kv_groups=self._groups,
            max_step_tokens=scheduler.max_num_scheduled_tokens,
            tokens_beside=self._drafting.num_slots,
            targets=self._promises.targets,
            whole_prompts=not scheduler.vllm_config.scheduler_config.enable_chunked_prefill,
            decode_width=self.decode_width,
            restore_blocks=self._drafting.restore_blocks,
            interruption_rate=traffic.interruption_rate,
            online_residency=traffic.online_residency,
            offline_share=traffic.offline_share,
            can_stop=can_stop,
            stop_gap_s=self._experience.stop_gap.seconds,
            copy_tokens=host.copy_tokens(now_s),
            copy_tail=host.least_tail,
            restore_tokens_per_s=host.restore_tokens_per_s,
            restore_queue_s=host.restore_queue_s,
            sharing=self._sharing.look(waiting_online, running, num_free_blocks, num_free_slots),
            num_remembered_blocks=self._remembering.room(now_s, running),
            copies_online=host.copies_online(self._experience.model),
            num_loading_online=host.num_loading(held_online),
            capacity=capacity_of(scheduler),
        )

    def _num_free_blocks(self) -> int:
        """Without those that vLLM keeps free of waiting requests while others run (--watermark)."""
        scheduler = self._scheduler
        if not scheduler.kv_cache_config.kv_cache_groups:
            return UNCOUNTED
        manager = scheduler.kv_cache_manager
        kept = manager.watermark_blocks if scheduler.running else 0
        return int(manager.block_pool.get_num_free_blocks() - kept)

    def _waiting_views(self, requests: Iterable[Any]) -> list[RequestView]:
        schedulable = (r for r in requests if r.status in SCHEDULABLE)
        most_tokens = self._scheduler.max_num_scheduled_tokens
        views = self._tracker.waiting(schedulable, self._find_cached, most_tokens)
        return with_drafts(self._scheduler, views)

    def _find_cached(self, request: Any) -> tuple[int, int]:
        """Tokens of a waiting request that vLLM will find computed when it admits it, and how many
        blocks of them somebody holds."""
        manager = self._scheduler.kv_cache_manager
        if request.num_computed_tokens or not manager.prefix_cache_lookup_enabled(request):
            return int(request.num_computed_tokens), 0
        longest = request.num_tokens - 1
        found, num_tokens = manager.coordinator.find_longest_cache_hit(
            request.block_hashes, longest
        )[:2]
        # Those that a window has left on the way are one and the same, and cost nothing.
        borrowed = sum(b.ref_cnt > 0 and not b.is_null for blocks in found for b in blocks)
        return int(num_tokens), borrowed
