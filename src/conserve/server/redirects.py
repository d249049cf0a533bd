"""ASGI middleware that makes redirects to the other spelling of a path, `/a/` for `/a`, relative.

An absolute one is made of what this server knows: behind a proxy that speaks https or cuts a
`--root-path` off it leads elsewhere, and takes the client's key there.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import URL, Headers, MutableHeaders
from starlette.responses import RedirectResponse

from conserve.server.asgi import App, Message, Receive, Scope, Send


class RelativeRedirectsMiddleware:
    """Touches nothing but the redirects that Starlette's router makes."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_relative(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 307:
                MutableHeaders(raw=message["headers"]).update(_relative_location(scope, message))
            await send(message)

        await self.app(scope, receive, send_relative if scope["type"] == "http" else send)


def _relative_location(scope: Scope, message: Message) -> dict[str, str]:
    """The header to put in the place of the router's; none for a redirect of somebody else's."""
    path: str = scope["path"]
    other = path[:-1] if path.endswith("/") else f"{path}/"
    routers = RedirectResponse(URL(scope={**scope, "path": other})).headers["location"]
    if Headers(raw=message["headers"]).get("location") != routers:
        return {}
    target = urlsplit(routers)
    last = target.path.rstrip("/").rpartition("/")[2]
    found = f"../{last}" if path.endswith("/") else f"./{last}/"
    return {"location": found + (f"?{target.query}" if target.query else "")}
