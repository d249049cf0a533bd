"""The engine between two steps, as the policy is told of it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from conserve.core.snapshot import RequestView, Snapshot
from conserve.engine.door import RequestStatus
from conserve.engine.queue import is_online
from conserve.engine.tracker import RequestTracker

OFFLINE_HEAD = 32
"""How many waiting offline requests the policy sees; a step admits no more."""
SCHEDULABLE = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


class TakesSnapshots:
    """Mixin over a vLLM scheduler."""

    can_stop: bool
    block_size: int
    experience: Any
    kv_cache_manager: Any
    kv_holding_waiting: Any
    max_num_active_reqs: int
    max_num_scheduled_tokens: int
    num_waiting_for_streaming_input: int
    running: list[Any]
    settings: Any
    tracker: RequestTracker
    waiting: Any
    _decode_width: int
    _others_busy: bool

    def _online_resident(self) -> bool:
        return bool(self.waiting.online) or any(is_online(r) for r in self.running)

    def snapshot(self, now_s: float) -> Snapshot:
        traffic = self.experience.traffic
        head = self.waiting.offline_head(OFFLINE_HEAD)
        # vLLM keeps those that hold blocks (their KV was loaded) apart, and admits them first.
        held = list(self.kv_holding_waiting)
        held_online = [r for r in held if is_online(r)]
        held_offline = [r for r in held if not is_online(r)]
        running = self.tracker.running(self.running)
        waiting_offline = self._waiting_views(chain(held_offline, head))
        return Snapshot(
            now_s=now_s,
            running=running,
            waiting_online=self._waiting_views(chain(held_online, self.waiting.online)),
            waiting_offline=waiting_offline,
            num_free_blocks=self.kv_cache_manager.block_pool.get_num_free_blocks(),
            num_free_slots=self.max_num_active_reqs
            - len(self.running)
            - self.num_waiting_for_streaming_input,
            block_size=self.block_size,
            max_step_tokens=self.max_num_scheduled_tokens,
            targets=self.settings.targets,
            decode_width=self._decode_width,
            interruption_rate=traffic.interruption_rate,
            online_residency=traffic.online_residency,
            offline_share=traffic.offline_share,
            # What a connector was asked once it will likely be asked again.
            can_stop=self.can_stop and not self._others_busy,
            **self._describe(running, waiting_offline),  # type: ignore[attr-defined]
        )

    def _waiting_views(self, requests: Iterable[Any]) -> list[RequestView]:
        schedulable = (r for r in requests if r.status in SCHEDULABLE)
        return self.tracker.waiting(
            schedulable, self._num_prefix_cached, self.max_num_scheduled_tokens
        )

    def _num_prefix_cached(self, request: Any) -> int:
        """Tokens of a waiting request that vLLM will find computed when it admits it."""
        manager = self.kv_cache_manager
        if request.num_computed_tokens or not manager.prefix_cache_lookup_enabled(request):
            return int(request.num_computed_tokens)
        longest = request.num_tokens - 1
        return int(manager.coordinator.find_longest_cache_hit(request.block_hashes, longest)[1])
