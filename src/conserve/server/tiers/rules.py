"""What the operator has set for the classes of requests, applied to one."""

from __future__ import annotations

from typing import Any

from conserve.engine.batch_line import current_line
from conserve.engine.settings import EngineSettings
from conserve.server.tiers.backlog import bound_by_class
from conserve.server.tiers.classes import RequestClass, classify, named_priority
from conserve.server.tiers.contradictions import Contradictions
from conserve.server.tiers.inherited import inherit
from conserve.server.tiers.waiting import FlexQueue, FlexWait, watch


class Rules:
    """What the operator has set for classes, and who waits: one an application."""

    def __init__(self, engine_client: Any) -> None:
        """`engine_client`: what vLLM's app asks; None where it asks nobody."""
        if engine_client:
            inherit(engine_client)
            watch(engine_client)
            bound_by_class(engine_client)
        config = getattr(engine_client, "vllm_config", None)
        settings = EngineSettings.of(getattr(config, "additional_config", None))
        self.offline_is_no_load = settings.router_metrics == "online"
        self._order = settings.priority_order
        self._contradictions = Contradictions(self._order)
        self.queue = FlexQueue(settings)

    def classify(self, body: dict[str, Any], priority_header: str | None) -> RequestClass | None:
        """Raises UnknownTierError."""
        if current_line() is not None:  # our own, in vLLM's order
            return classify(body, priority_header)
        priority = named_priority(body, priority_header)
        found = classify(body, priority_header, higher_first=self._order == "higher-first")
        if priority is not None:
            self._contradictions.look(body.get("service_tier"), priority)
        return found

    def waits_for(self, header: str | None) -> FlexWait | None:
        """An offline request's wait, but for lines of batches. Raises RefusedError."""
        return self.queue.enter(header) if current_line() is None else None
