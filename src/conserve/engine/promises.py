"""What online requests are promised here: the engine's targets, and where they come from."""

from __future__ import annotations

from typing import Any

from conserve.core.latency import LatencyModel
from conserve.core.machine_targets import ChosenTargets
from conserve.core.snapshot import Targets
from conserve.engine.settings import EngineSettings

TARGETS_METHOD = "conserve_targets"
"""Of vLLM's EngineCore, as the plugin adds it: what API processes ask for the targets."""


class Promises:
    """The targets are set once more, by what was measured, before any request comes; from then on
    they stay, whatever is learned of step times."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self.chosen: ChosenTargets = settings.targets_on(None)

    @property
    def targets(self) -> Targets:
        return self.chosen.targets

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
