"""The negative controls: ways of doing it wrong that every family's checks must notice."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch


def keep_what_was_stopped() -> AbstractContextManager[Any]:
    """What a stopped step was to compute of prompts counts as computed: later tokens read what was
    never written, and who has all of a prompt in a step waits for ever."""
    from conserve.engine.stopped import roll_back

    def careless(scheduler: Any, scheduled: dict[str, int], before: Any) -> list[str]:
        requests = scheduler.requests
        chunked = scheduler.vllm_config.scheduler_config.enable_chunked_prefill
        taken_back = {
            name: num_tokens
            for name, num_tokens in scheduled.items()
            if name not in requests or not _is_kept(requests[name], chunked=chunked)
        }
        return roll_back(scheduler, taken_back, before)

    return patch("conserve.engine.stopper.roll_back", careless)


def _is_kept(request: Any, *, chunked: bool) -> bool:
    """Whether the step that was stopped had a part of its prompt, or all of one that is not cut."""
    num_missing = request.num_prompt_tokens - request.num_computed_tokens
    return bool(request.pooling_params) or num_missing > (0 if chunked else -1)


def restore_the_half() -> AbstractContextManager[Any]:
    """Only half of the blocks that a displaced request needs come back: of several groups of
    layers, those of the later ones."""
    from conserve.engine.checkpoint.pool import HostPool

    places = HostPool.places

    def careless(self: HostPool, *args: Any) -> Any:
        found = places(self, *args)
        return found[-(-len(found) // 2) :]

    return patch.object(HostPool, "places", careless)


def leave_states_as_they_are() -> AbstractContextManager[Any]:
    """A stopped step leaves recurrent state as far as its layers have come."""
    from conserve.engine.kept_states import KeptStates

    return patch.object(KeptStates, "put_back", lambda self: None)


CONTROLS = {
    "checkpoints": restore_the_half,
    "states": leave_states_as_they_are,
    "stops": keep_what_was_stopped,
}
"""In the order in which one engine goes through them: it may not survive the last."""
