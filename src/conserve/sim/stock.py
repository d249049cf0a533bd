"""vLLM's own scheduler, for the stock arms."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import islice

from conserve.core.blocks import blocks_for
from conserve.core.latency import LatencyModel, StepShape
from conserve.core.plan import Mode, Plan
from conserve.core.snapshot import RequestView
from conserve.sim.places import Places
from conserve.sim.request import SimRequest
from conserve.sim.step import Step


class StockScheduler:
    """vLLM 0.32's own scheduling with chunked prefill: what the stock arms run.

    A step has a fixed number of tokens. Running requests take theirs in the order of
    admission, then waiting ones are admitted in the order of the queue while slots and
    blocks (for all their known tokens) last: by arrival, or online first (`by_class`).
    """

    keeps_in_flight = False
    class_aware = False
    model: LatencyModel | None = None

    def __init__(self, *, by_class: bool) -> None:
        self.by_class = by_class

    def joins(self, places: Places) -> None:
        """It leaves no room to anybody."""

    def plan(self, places: Places, now_s: float) -> Plan:
        tokens = _StockTokens()
        left = places.machine.max_step_tokens
        for request in places.running:
            left -= tokens.grant(request, left)
        slots, free = places.num_free_slots, places.pool.num_free_blocks
        size = places.machine.block_size
        for request in self._queue(places, slots):
            places.note_found([request])
            in_use = places.num_in_use(request)
            if not left or not slots or blocks_for(request.num_tokens, size) - in_use > free:
                break
            granted = tokens.grant(request, left)
            slots, left = slots - 1, left - granted
            free -= blocks_for(request.num_computed_tokens + granted, size) - in_use
        return tokens.plan(places)

    def held_back(self, places: Places, now_s: float) -> None:
        """No stock step can be stopped."""

    def _queue(self, places: Places, most: int) -> list[SimRequest]:
        """The first `most` waiting requests in the order of admission."""
        heads = [
            *islice(places.waiting_online, most),
            *islice(places.waiting_offline, most),
        ]
        if not self.by_class:
            heads.sort(key=lambda r: r.arrival_s)
        return heads

    def predict_s(self, shape: StepShape) -> float:
        return 0.0

    def online_share(self, step: Step) -> float:
        """It predicts nothing: by tokens."""
        return step.num_online_tokens / step.shape.num_tokens

    def stop_at_s(self, places: Places, step: Step, now_s: float) -> float:
        return math.inf

    def layers_between_looks(self, step: Step, num_layers: int) -> int:
        return num_layers

    def ended(self, places: Places, step: Step, now_s: float) -> None:
        """It learns nothing from steps."""


@dataclass(slots=True)
class _StockTokens:
    """What a stock step has granted so far."""

    grants: dict[str, int] = field(default_factory=dict)
    shape: StepShape = field(default_factory=StepShape)
    num_online: int = 0

    def grant(self, request: RequestView, most: int) -> int:
        """Up to `most` of the tokens that it has left; returns how many."""
        context = request.num_computed_tokens
        tokens = min(request.num_tokens - context, most)
        if tokens <= 0:
            return 0
        if tokens == 1 and request.last_token_s is not None:
            self.shape.add_decode(tokens, context)
        else:
            self.shape.add_prefill(tokens, context)
        self.grants[request.request_id] = tokens
        self.num_online += tokens if request.online else 0
        return tokens

    def plan(self, places: Places) -> Plan:
        return Plan(
            mode=self._mode(places),
            grants=self.grants,
            shape=self.shape,
            num_online_tokens=self.num_online,
            num_offline_tokens=self.shape.num_tokens - self.num_online,
        )

    def _mode(self, places: Places) -> Mode:
        """For reading traces only: stock steps have no mode."""
        if not self.grants:
            return Mode.IDLE
        if not self.num_online:
            return Mode.OFFLINE
        return Mode.ONLINE_PREFILL if places.waiting_online else Mode.ONLINE_DECODE
