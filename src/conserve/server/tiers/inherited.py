"""The class of what vLLM asks its engine on behalf of one request.

Beam search asks once for each token of each beam, and does not pass the request's priority on. A
response's loop of tool calls asks once for each turn, every one but the first a priority ahead.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from conserve.server.tiers.classes import OFFLINE_PRIORITY

_priority: ContextVar[int] = ContextVar("priority", default=0)


def remember(priority: int) -> None:
    """For what this task, and those that it starts, asks of the engine."""
    _priority.set(priority)


def remembered_priority() -> int:
    return _priority.get()


def inherit(engine_client: Any) -> None:
    """Let what is asked of this client without a priority have the remembered one, and let nothing
    leave the class of it. To do it again changes nothing."""
    if "generate" in vars(engine_client):
        return
    generate = engine_client.generate

    def inheriting(*args: Any, **kwargs: Any) -> Any:
        return generate(*args, **{**kwargs, "priority": _in_class(kwargs.get("priority"))})

    engine_client.generate = inheriting


def _in_class(asked: int | None) -> int:
    remembered = remembered_priority()
    if asked is None:
        return remembered
    return max(asked, OFFLINE_PRIORITY) if remembered >= OFFLINE_PRIORITY else asked
