"""The shape of an ASGI app, as our middleware sees it, and what a scope says."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def path_of(scope: Scope) -> str:
    """Of a request, without what the app is mounted below."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path") or "")


def header(scope: Scope | Message, name: bytes) -> str | None:
    """Of a request or of a response's start; `name` in small letters."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)
