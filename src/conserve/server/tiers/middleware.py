"""ASGI middleware that turns `service_tier` into vLLM's `priority`, and says it in the response;
a request's own targets go along.

Works in `conserve serve` and, by name, under plain vLLM:
`vllm serve --middleware conserve.server.tiers.ServiceTierMiddleware`.

The request body is rewritten as the application reads it, so authentication comes first and a
client that sends none is none of our business. A stream is passed on event by event: a chunk
costs one prefix test and one concatenation.
"""

from __future__ import annotations

from typing import Any

from conserve.server.asgi import App, Receive, Scope, Send, path_of
from conserve.server.tiers.exchange import PRIORITY_HEADER, Exchange
from conserve.server.tiers.load import Uncounted
from conserve.server.tiers.paths import PATHS, VECTOR_PATHS
from conserve.server.tiers.rules import Rules


class ServiceTierMiddleware:
    """Classifies requests of the OpenAI endpoints; everything else passes untouched."""

    def __init__(self, app: App) -> None:
        self.app = app
        self._rules: Rules | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ours = PATHS | VECTOR_PATHS
        if scope["type"] != "http" or scope["method"] != "POST" or path_of(scope) not in ours:
            await self.app(scope, receive, send)
            return
        state = _state(scope)
        if self._rules is None:
            self._rules = Rules(getattr(state, "engine_client", None))
        uncounted = Uncounted(state if self._rules.offline_is_no_load else None)
        exchange = Exchange(receive, send, scope, self._rules, uncounted)
        # The header is folded into the body: vLLM would let it overrule what we write there.
        headers = [(name, value) for name, value in scope["headers"] if name != PRIORITY_HEADER]
        try:
            await self.app({**scope, "headers": headers}, exchange.receive, exchange.send)
        except Exception:
            if not exchange.is_given_up:
                raise
        finally:
            uncounted.put_back()
            exchange.end()
        await exchange.refuse_late()


def _state(scope: Scope) -> Any:
    """Of vLLM's app, which holds its client of the engine; None of an app without."""
    app = scope.get("app")
    return app.state if app else None
