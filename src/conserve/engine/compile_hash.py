"""Keeps our settings out of the key of vLLM's compile cache.

vLLM hashes all of `additional_config`, since it cannot know what a platform reads from it. Ours
changes no graph: an engine with other targets finds what was compiled for the last one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from conserve.engine.settings import KEY


def leave_out_settings(config_class: Any) -> None:
    """Wrap the `compute_hash` of vLLM's VllmConfig, in a process that may compile."""
    config_class.compute_hash = _without_ours(config_class.compute_hash)


def _without_ours(compute_hash: Callable[..., str]) -> Callable[..., str]:
    @wraps(compute_hash)
    def of_the_others(self: Any, *args: Any, **kwargs: Any) -> str:
        extra = self.additional_config
        if isinstance(extra, Mapping) and KEY in extra:
            self = copy.copy(self)
            self.additional_config = {key: extra[key] for key in extra if key != KEY}
        return compute_hash(self, *args, **kwargs)

    return of_the_others
