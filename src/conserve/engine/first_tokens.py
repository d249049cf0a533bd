"""What online first tokens waited for in this engine, for the metrics."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from conserve.core.learning import Experience
from conserve.engine.monitor import AskedStop
from conserve.engine.queue import is_online
from conserve.engine.stats import EngineStats
from conserve.engine.steps import StepRecord
from conserve.metrics.first_tokens import EndedStep, FirstTokens, kind_of, online_share


class FirstTokenParts:
    """Tells `FirstTokens` of requests and steps, and the metrics of what it answers."""

    def __init__(self, stats: EngineStats, experience: Experience) -> None:
        self._stats = stats
        self._experience = experience
        self._waits = FirstTokens()

    def came(self, request: Any, arrived_s: float, now_s: float) -> None:
        """The scheduler learns of a request."""
        if is_online(request):
            self._waits.arrived(request.request_id, arrived_s, now_s)

    def ended(
        self, record: StepRecord, computed: Collection[str], *, stopped: AskedStop | None
    ) -> None:
        """A step is over; `computed` are those it gave tokens to, none if it was stopped."""
        num_offline = record.offline_shape.num_tokens
        num_online = record.shape.num_tokens - num_offline
        if not record.shape.num_tokens or record.times is None:
            return
        plan, share = record.plan, 1.0
        if num_offline:
            share = online_share(self._experience.model, plan.online_shape, record.shape)
        self._waits.ended(
            EndedStep(
                record.started_s,
                record.times.ended_s,
                kind_of(plan.mode, num_online, num_offline, stoppable=plan.stoppable),
                computed,
                share,
                *(() if stopped is None else (stopped.at_s,)),
            )
        )

    def emitted(self, request_id: str, now_s: float) -> None:
        """New tokens of a request left the engine."""
        for part, seconds in self._waits.first_token(request_id, now_s).items():
            self._stats.observe("first_token_part_seconds", seconds, str(part))

    def drop_finished(self, live: Collection[str]) -> None:
        """Forget every request that is not in `live`; call it now and then."""
        self._waits.drop_finished(live)

    def forget_all(self) -> None:
        self._waits = FirstTokens()
