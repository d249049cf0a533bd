"""What the engine holds between two steps: requests, and blocks of KV memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain
from typing import Any

from conserve.core.latency import LatencyModel
from conserve.core.plan import Plan
from conserve.core.snapshot import Snapshot
from conserve.engine.promises import Promises
from conserve.engine.queue import is_online
from conserve.engine.scheduler_view import SchedulerView
from conserve.engine.stats import EngineStats
from conserve.engine.tracker import RequestTracker
from conserve.metrics.bound import Crowd
from conserve.metrics.harvest_budget import HarvestBudget, step_budget

BLOCKS_EVERY_S = 0.5
"""Seconds between two looks: one takes time with the number of blocks of online requests."""
NULL_BLOCK = 0
"""vLLM's placeholder for a block that a sliding window has left behind."""


class Gauges:
    """Sets them."""

    def __init__(
        self,
        scheduler: SchedulerView,
        promises: Promises,
        tracker: RequestTracker,
        stats: EngineStats,
    ) -> None:
        self._scheduler = scheduler
        self._promises = promises
        self._stats = stats
        self._tracker = tracker
        self._looked_s = -math.inf
        self._budget = HarvestBudget()
        self.kv_online_usage = 0.0
        """Share of KV memory that online requests held at the last look at blocks."""
        self.crowd = Crowd()
        """As of the last look; its blocks are those of the last look at blocks."""

    def look(self, now_s: float) -> None:
        """Call after every step."""
        running, waiting = self._scheduler.running, self._scheduler.waiting
        held = self._scheduler.kv_holding_waiting
        online = [r for r in running if is_online(r)]
        for what, num_online, num in (
            ("running_requests", len(online), len(running)),
            ("waiting_requests", len(waiting.online) + len(held.online), len(waiting) + len(held)),
        ):
            self._stats.set(what, num_online, "online")
            self._stats.set(what, num - num_online, "offline")
        self.crowd = self.crowd._replace(
            num_running=len(running) - len(online),
            num_waiting=len(waiting.offline),
            num_free_slots=self._scheduler.max_num_active_reqs - len(running),
        )
        if not running and not waiting and not held:
            self._budget.idle()
        self._stats.set("harvest_budget_ratio", self._budget.value)
        # The step after the last request is the last for a while: what it says stands.
        if not running or now_s - self._looked_s >= BLOCKS_EVERY_S:
            self._looked_s = now_s
            self._look_at_blocks(chain(online, held.online))
            self._say_targets()
            self._stats.set("oldest_offline_wait_seconds", self._oldest_wait_s(now_s))

    def decided(self, snapshot: Snapshot, plan: Plan, model: LatencyModel) -> None:
        """Call with every plan of the policy's."""
        if self._budget.wants(snapshot.now_s):
            scheduler = self._scheduler
            waiting = len(scheduler.waiting.offline) + len(scheduler.kv_holding_waiting.offline)
            budget = step_budget(
                snapshot,
                plan,
                model,
                num_waiting_offline=waiting,
                num_blocks=scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1,
                num_slots=scheduler.max_num_active_reqs,
            )
            self._budget.showed(snapshot.now_s, budget)

    def forget(self) -> None:
        """What was looked at until here was nobody's work."""
        self._budget = HarvestBudget()

    def _say_targets(self) -> None:
        """The API process knows those that were named, and hears of the others here."""
        targets = self._promises.targets
        self._stats.set("ttft_target_seconds", targets.ttft_s)
        self._stats.set("tbt_target_seconds", targets.tbt_s)

    def _look_at_blocks(self, online: Iterable[Any]) -> None:
        manager = self._scheduler.kv_cache_manager
        held: set[int] = set()
        for request in online:
            held.update(*manager.get_block_ids(request.request_id))
        held.discard(NULL_BLOCK)
        pool = manager.block_pool
        num_free = pool.get_num_free_blocks()
        num_blocks = pool.num_gpu_blocks - 1
        num_used = num_blocks - num_free
        self._stats.set("kv_free_blocks", num_free)
        self._stats.set("kv_blocks", len(held), "online")
        self._stats.set("kv_blocks", num_used - len(held), "offline")
        self.kv_online_usage = len(held) / num_blocks if num_blocks else 0.0
        self._stats.set("kv_usage_ratio", self.kv_online_usage, "online")
        usage = num_used / num_blocks if num_blocks else 0.0
        self._stats.set("kv_usage_ratio", usage - self.kv_online_usage, "offline")
        self.crowd = self.crowd._replace(num_blocks=num_used - len(held), num_free_blocks=num_free)

    def _oldest_wait_s(self, now_s: float) -> float:
        """Since its last token, or since it came where it has had none."""
        scheduler = self._scheduler
        held = chain(scheduler.running, scheduler.kv_holding_waiting)
        offline = (request for request in held if not is_online(request))
        found = (
            self._tracker.get(request.request_id)
            for request in chain(offline, scheduler.waiting.offline_oldest())
        )
        return max((now_s - (v.last_token_s or v.arrival_s) for v in found if v), default=0.0)
