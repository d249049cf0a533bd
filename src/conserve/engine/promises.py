"""What requests are promised here: the engine's targets with where they come from, and those that
a request names itself."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from conserve.core.latency import LatencyModel
from conserve.core.snapshot import OFFLINE_TTFT_S, Targets
from conserve.engine.queue import is_online
from conserve.engine.settings import EngineSettings
from conserve.metrics.machine_targets import ChosenTargets

TARGETS_METHOD = "conserve_targets"
"""Of vLLM's EngineCore, as the plugin adds it: what API processes ask for the targets."""


TTFT_ARG, TBT_ARG = "conserve_ttft_target_s", "conserve_tbt_target_s"
"""A request's own targets in its sampling parameters' `extra_args` (`vllm_xargs` in a body)."""


class OwnTargets(NamedTuple):
    """Those that a request names, in seconds; None: it leaves that to the engine."""

    ttft_s: float | None = None
    tbt_s: float | None = None

    @classmethod
    def named_by(cls, request: Any) -> OwnTargets:
        """What is no number above 0 counts for nothing: the API process has refused it."""
        extra = getattr(request.sampling_params, "extra_args", None) or {}
        return cls(_seconds(extra.get(TTFT_ARG)), _seconds(extra.get(TBT_ARG)))


def _seconds(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if 0 < value < math.inf else None


class Promises:
    """The targets are set once more, by what was measured, before any request comes; from then on
    they stay, whatever is learned of step times."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self.chosen: ChosenTargets = settings.targets_on(None)

    @property
    def targets(self) -> Targets:
        return self.chosen.targets

    def own_targets(self, request: Any) -> OwnTargets:
        """An online request's, within the operator's bound: its targets, or a share of them."""
        named = OwnTargets.named_by(request)
        share, targets = self._settings.slo_min_share, self.targets
        return OwnTargets(
            named.ttft_s and max(named.ttft_s, share * targets.ttft_s),
            named.tbt_s and max(named.tbt_s, share * targets.tbt_s),
        )

    def wait_s(self, request: Any) -> float:
        """How long after its arrival a request would like its first token: the queue's order."""
        if is_online(request):
            return self.own_targets(request).ttft_s or self.targets.ttft_s
        return OwnTargets.named_by(request).ttft_s or OFFLINE_TTFT_S

    def measured(self, model: LatencyModel) -> None:
        self.chosen = self._settings.targets_on(model)


def told_targets(engine_core: Any) -> list[Any] | None:
    """The fields of ChosenTargets as vLLM carries them to an API process; None from an engine
    without our scheduler."""
    promises = getattr(engine_core.scheduler, "promises", None)
    if promises is None:
        return None
    chosen = promises.chosen
    return [chosen.targets.ttft_s, chosen.targets.tbt_s, chosen.ttft_reason, chosen.tbt_reason]


async def ask_targets(engine_client: Any, settings: EngineSettings) -> ChosenTargets:
    """The engine's targets, asked by an API process; those of the settings where nobody answers
    for an engine."""
    core = getattr(engine_client, "engine_core", None)
    told = await core.call_utility_async(TARGETS_METHOD) if core is not None else None
    if told is None:
        return settings.targets_on(None)
    ttft_s, tbt_s, ttft_reason, tbt_reason = told
    return ChosenTargets(Targets(ttft_s, tbt_s), ttft_reason, tbt_reason)
