"""Which web pages may use our routes.

A browser sends the requests of any page that its user visits, also to a server on the user's own
machine: a form or a plain fetch needs nobody's leave to upload a file or cancel a batch. And a
page's owner may point its name at that machine (DNS rebinding), so that the page may read, too.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Collection, Mapping
from functools import cache
from ipaddress import ip_address
from urllib.parse import urlsplit

from fastapi import Request

from conserve.batch.errors import BatchError
from conserve.server.keys import api_keys

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
OWN = ("same-origin", "none")
"""Of `Sec-Fetch-Site`: a page of ours, or the user, who typed the address."""
LOCAL_NAMES = (".localhost", ".local", ".internal", ".home.arpa", ".test")
"""Nobody can register a name below these, nor one without a dot."""


class ForeignPageError(BatchError):
    """The request is a web page's that has no business here."""

    status_code = 403
    code = "foreign_page"


async def check_page(request: Request) -> None:
    """Programs pass, which name no page. Raises ForeignPageError."""
    try:
        await _check(request)
    except ValueError as error:
        raise ForeignPageError(f"Host or Origin is no address: {error}.") from error


async def _check(request: Request) -> None:
    args = getattr(request.app.state, "args", None)
    allowed = getattr(args, "allowed_origins", ())
    if "*" in allowed:
        return
    if not (args and api_keys(args)) and _came_to_this_machine(request):
        await _check_name(request.headers.get("host", ""), allowed)
    if is_foreign(request.method, request.headers, allowed):
        page = request.headers.get("origin", "another site")[:100]
        raise ForeignPageError(
            f"A page of {page} may not use this server. "
            "Name its origin in --allowed-origins if it is to."
        )


def is_foreign(method: str, headers: Mapping[str, str], allowed: Collection[str]) -> bool:
    """Whether a page of another origin sends this. Links to here are followed, and what a page
    loads without being able to read it does no harm."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if origin in allowed or site in OWN:
        return False
    if site is not None:
        return origin is not None or method not in SAFE_METHODS
    # Browsers leave `Sec-Fetch-Site` out on plain http. A page that sends `X-Forwarded-Host`
    # itself has to ask first, and is not allowed to.
    here = {headers.get("host", "").lower(), headers.get("x-forwarded-host", "").lower()}
    return origin is not None and urlsplit(origin).netloc.lower() not in here - {""}


def _came_to_this_machine(request: Request) -> bool:
    """Whether the connection is from this machine to itself, by whichever of its addresses: a
    browser here, or a proxy."""
    (here, _), (there, _) = (request.scope.get(end) or ("", None) for end in ("server", "client"))
    try:
        address = ip_address(here)
    except ValueError:
        return False
    # To a socket for both, IPv4's addresses are IPv6's ::ffff:127.0.0.1.
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or here == there


async def _check_name(host: str, allowed: Collection[str]) -> None:
    """Raises ForeignPageError for a name that anybody may have pointed at this machine."""
    name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    if name in {urlsplit(origin).hostname for origin in allowed} or is_local(name):
        return
    if name in await asyncio.to_thread(own_names):  # the resolver may take seconds
        return
    raise ForeignPageError(
        f"{name[:100]!r} is no name of this machine, and without API keys a web page could use it "
        "to reach this server. Set --api-key, or name the origin in --allowed-origins, as in "
        f"'[\"https://{name[:100]}\"]'."
    )


def is_local(name: str) -> bool:
    """Whether nobody else can have pointed `name` at this machine."""
    return "." not in name or name.endswith(LOCAL_NAMES) or _is_address(name)


@cache
def own_names() -> frozenset[str]:
    return frozenset({socket.gethostname().lower(), socket.getfqdn().lower()})


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
