"""What start says of the model that it serves: a line for each thing that is on, or off and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from conserve.engine.checkpoint.sizes import why_no_conversations
from conserve.engine.door import VLLM_VERSION, init_logger
from conserve.engine.versions import warning

logger = init_logger("vllm.conserve")


@dataclass(frozen=True)
class Ability:
    """Something that ConServe does for some models, or some ways to start, and not for others."""

    name: str
    on: str
    """What it does."""
    off: str
    """What happens instead."""
    why_off: str = ""
    """Nothing if it is on."""

    def __str__(self) -> str:
        if self.why_off:
            return f"{self.name}: off: {self.why_off}; {self.off}"
        return f"{self.name}: on: {self.on}"


def say(scheduler: Any) -> None:
    """Log them all; `scheduler` is a whole ConserveScheduler."""
    if uncertain := warning(VLLM_VERSION):
        logger.warning("ConServe: %s: outputs may be wrong, and steps fail.", uncertain)
    for ability in abilities(scheduler):
        logger.info("ConServe: %s", ability)


def abilities(scheduler: Any) -> Iterator[Ability]:
    """Those that the model and the settings leave a question."""
    yield Ability(
        "stops",
        on="a step makes room for an online request between two layers",
        off="an online request waits for the step that runs",
        why_off=scheduler.stopper.why_off,
    )
    yield _checkpoints(scheduler)
    if not scheduler.checkpointer.unusable:
        yield _conversations(scheduler)
    if scheduler.num_spec_tokens:
        yield Ability("drafts", on=f"{scheduler.num_spec_tokens} a request and step", off="")
    if not scheduler.vllm_config.scheduler_config.enable_chunked_prefill:
        yield Ability(
            "parts of prompts",
            on="",
            off="a prompt is computed in one step",
            why_off="vLLM cuts no prompt of this model",
        )


def _checkpoints(scheduler: Any) -> Ability:
    how = scheduler.settings.checkpoint
    return Ability(
        "checkpoints",
        on=f"of offline requests ({how}), once there is memory for them",
        off="displaced requests compute again",
        why_off=scheduler.checkpointer.unusable,
    )


def _conversations(scheduler: Any) -> Ability:
    pool = scheduler.checkpointer.pool
    return Ability(
        "conversations",
        on="what online requests leave is kept on the host, for their next turns",
        off="a turn is computed anew where blocks of those before it are gone",
        why_off=why_no_conversations(scheduler.vllm_config, scheduler.settings, pool),
    )
