"""The class of what vLLM asks its engine on behalf of one request.

Beam search asks once for each token of each beam, and does not pass the request's priority on.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

_priority: ContextVar[int] = ContextVar("priority", default=0)


def remember(priority: int) -> None:
    """For what this task, and those that it starts, asks of the engine without a priority."""
    _priority.set(priority)


def inherit(engine_client: Any) -> None:
    """Let what is asked of this client without a priority have the remembered one. To do it again
    changes nothing."""
    if "generate" in vars(engine_client):
        return
    generate = engine_client.generate

    def inheriting(*args: Any, **kwargs: Any) -> Any:
        return generate(*args, **{"priority": _priority.get(), **kwargs})

    engine_client.generate = inheriting
