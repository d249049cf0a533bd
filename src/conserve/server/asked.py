"""Who is told of what the app asks of vLLM's engine, in the context of the request that asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Told = Callable[[Any, Any, Any], None]
"""Gets vLLM's output processor, a request to the engine, and the processor's state of it."""


def tell_of_requests(engine_client: Any, told: Told) -> None:
    """Call `told` for each request that this client takes, once. To ask for it again changes
    nothing, and neither does a client that has no output processor."""
    processor = getattr(engine_client, "output_processor", None)
    add_request = getattr(processor, "add_request", None)
    if add_request is None:
        return
    listeners: list[Told] | None = getattr(add_request, "listeners", None)
    if listeners is None:
        listeners = []
        _listen(processor, add_request, listeners)
    if told not in listeners:
        listeners.append(told)


def _listen(processor: Any, add_request: Any, listeners: list[Told]) -> None:
    def telling(request: Any, *args: Any, **kwargs: Any) -> Any:
        # More input to a request that is there, or the end of its input, comes the same way.
        is_more = request.request_id in processor.request_states
        added = add_request(request, *args, **kwargs)
        if not is_more:
            state = processor.request_states[request.request_id]
            for told in listeners:
                told(processor, request, state)
        return added

    telling.listeners = listeners  # type: ignore[attr-defined]
    processor.add_request = telling
