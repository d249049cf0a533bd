"""Owners are told when a batch ends: signed as Standard Webhooks says and OpenAI does, again and
again until one try is answered with 2xx, always under the same id.

Names are looked up once a try, and the connection goes to the address that was checked. Redirects
are not followed, and no proxy is used.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import logging
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from hashlib import sha256
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from ssl import SSLContext
from typing import NamedTuple

import httpx
from pydantic import BaseModel, ConfigDict, Field, field_validator

from conserve.batch.webhook_endpoint import Endpoint, delay_s
from conserve.batch.webhook_store import Event, WebhookStore

logger = logging.getLogger(__name__)

SECRET_PREFIX = "whsec_"  # noqa: S105  (what a secret begins with)
TIMEOUT_S = 15.0
GIVE_UP_S = 72 * 3600.0
AT_ONCE = 32
"""Tries under way in one process."""
DOUBTFUL_AT_ONCE = AT_ONCE // 2
"""Those of them to endpoints that may not answer, however many there are."""
LOOK_S = 0.5
"""Between looks for events of others while tries are under way."""

LOOKUPS = ThreadPoolExecutor(4 * AT_ONCE, "conserve-webhooks")
"""Of their own: files are read in the loop's threads. A lookup that hangs outlives its try, by as
long as a resolver takes, a minute maybe, and must leave threads to those that come after it."""
EVERYBODYS = ip_network("2000::/3")
"""All that is given out of IPv6 for hosts that anybody may reach."""
NAT64 = ip_network("64:ff9b::/96")
"""Addresses of IPv4 hosts, as networks that speak IPv6 alone see them."""


class Webhook(BaseModel):
    """Where an owner is told, and with which secret."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
    url: str
    secret: str = Field(repr=False)
    allow_private: bool = False

    @field_validator("url")
    @classmethod
    def _is_url(cls, url: str) -> str:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ValueError(f"is no URL: {error}") from None
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo:
            raise ValueError("must be an http or https URL, without a password")
        return url

    @field_validator("secret")
    @classmethod
    def _is_secret(cls, secret: str) -> str:
        try:
            key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
        except binascii.Error:
            key = b""
        if not secret.startswith(SECRET_PREFIX) or len(key) < 24:
            raise ValueError(f"must be {SECRET_PREFIX} and at least 24 bytes in base64")
        return secret

    @property
    def key(self) -> bytes:
        return base64.b64decode(self.secret.removeprefix(SECRET_PREFIX))


class RefusedAddressError(Exception):
    """The URL leads to an address that is not to be asked."""


class Owed(NamedTuple):
    """Who is to be told of something, and where; nowhere without a hook."""

    tenant: str
    hook: Webhook | None
    endpoint: Endpoint


class Webhooks:
    def __init__(
        self,
        store: WebhookStore,
        hook_of: Callable[[str], Webhook | None],
        clock: Callable[[], float],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._hook_of = hook_of
        self._clock = clock
        self._monotonic = monotonic
        self._endpoints: dict[str, Endpoint] = {}

    async def deliver(self) -> None:
        """Try all that is due, and what comes due meanwhile. Raises StoreUnavailableError."""
        tries: set[asyncio.Task[None]] = set()
        try:
            while True:
                await self._begin(tries)
                if not tries:
                    return
                done, tries = await asyncio.wait(
                    tries, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED
                )
                for one in done:
                    one.result()
        finally:
            for one in tries:
                one.cancel()
            await asyncio.gather(*tries, return_exceptions=True)

    async def _begin(self, tries: set[asyncio.Task[None]]) -> None:
        """Add to `tries`, which are under way, as many as there is room for here and at their
        endpoints, the one that was asked longest ago first."""
        if len(tries) >= AT_ONCE:
            return
        owed = [self._owed(tenant) for tenant in await self._store.owners()]
        await self._give_up_old(owed)
        for tenant, hook, endpoint in sorted(owed, key=lambda each: each.endpoint.asked_at):
            limit = min(AT_ONCE - len(tries), self._room(endpoint))
            for event in await self._store.take(tenant, limit) if limit > 0 else []:
                trying = self._tell(hook, endpoint, event)
                tries.add(endpoint.begin(trying, self._monotonic()))

    def _owed(self, tenant: str) -> Owed:
        hook = self._hook_of(tenant)
        return Owed(tenant, hook, self._endpoints.setdefault(hook.url if hook else "", Endpoint()))

    def _room(self, endpoint: Endpoint) -> int:
        """How many tries of it may begin, as far as it and others like it are concerned."""
        room = endpoint.room(self._monotonic())
        if not room or not endpoint.is_doubtful:
            return room
        doubtful = sum(each.num_tries for each in self._endpoints.values() if each.is_doubtful)
        return min(room, DOUBTFUL_AT_ONCE - doubtful)

    async def _give_up_old(self, owed: Iterable[Owed]) -> None:
        """A dead endpoint is asked about one event at a time: what it will never be asked about
        goes with the others of its age."""
        for tenant, _, endpoint in owed:
            if endpoint.is_dead and endpoint.room(self._monotonic()):
                num_gone = await self._store.give_up(tenant, self._clock() - GIVE_UP_S)
                if num_gone:
                    logger.error("%d webhooks are given up: nobody answers them", num_gone)

    async def _tell(self, hook: Webhook | None, endpoint: Endpoint, event: Event) -> None:
        if hook is None:
            endpoint.answers()
        if hook is None or await self._is_told(hook, endpoint, event):
            await self._store.forget(event)
        elif self._clock() - event.created_at > GIVE_UP_S:
            logger.error("the webhook for %s is given up", event.batch_id)
            await self._store.forget(event)
        else:
            await self._store.postpone(event, delay_s(event.attempts))

    async def _is_told(self, hook: Webhook, endpoint: Endpoint, event: Event) -> bool:
        body = body_of(event)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                status = await post(hook, body, signed(hook.key, event, body, self._clock()))
        except Exception as error:  # of whatever kind: it must not end the service
            logger.warning("the webhook for %s fails: %r", event.batch_id, error)
            endpoint.is_silent(self._monotonic())
            return False
        endpoint.answers()
        if not 200 <= status < 300:
            logger.warning("the webhook for %s is answered with %d", event.batch_id, status)
        return 200 <= status < 300


def event_id(event: Event) -> str:
    return f"evt_{event.batch_id}"


def body_of(event: Event) -> bytes:
    told = {
        "id": event_id(event),
        "object": "event",
        "created_at": int(event.created_at),
        "type": f"batch.{event.status}",
        "data": {"id": event.batch_id},
    }
    return json.dumps(told).encode()


def signed(key: bytes, event: Event, body: bytes, now: float) -> dict[str, str]:
    """Headers of one try."""
    name, moment = event_id(event), str(int(now))
    text = b".".join((name.encode(), moment.encode(), body))
    signature = base64.b64encode(hmac.digest(key, text, sha256)).decode()
    return {
        "content-type": "application/json",
        "webhook-id": name,
        "webhook-timestamp": moment,
        "webhook-signature": f"v1,{signature}",
    }


async def post(hook: Webhook, body: bytes, headers: dict[str, str]) -> int:
    """Status of the answer. Raises RefusedAddressError, httpx's errors and OSError."""
    url = httpx.URL(hook.url)
    address = await allowed_address(url, allow_private=hook.allow_private)
    trusted = await asyncio.to_thread(certificates)
    async with httpx.AsyncClient(
        verify=trusted, trust_env=False, follow_redirects=False, timeout=TIMEOUT_S
    ) as client:
        request = client.build_request(
            "POST",
            url.copy_with(host=address),
            content=body,
            headers={**headers, "host": url.netloc.decode()},
            extensions={"sni_hostname": url.host},
        )
        response = await client.send(request, stream=True)
        await response.aclose()  # what it says is not read
        return response.status_code


@cache
def certificates() -> SSLContext:
    """Whom a try trusts. Reading them takes tens of milliseconds, which is too long for a loop that
    answers chats, and for each try."""
    return httpx.create_ssl_context(trust_env=False)


async def allowed_address(url: httpx.URL, *, allow_private: bool) -> str:
    """The address to connect to, looked up here so that it is the one that is checked. One that is
    not everybody's refuses them all."""
    port = url.port or (443 if url.scheme == "https" else 80)
    lookup = partial(socket.getaddrinfo, url.host, port, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(LOOKUPS, lookup)
    addresses = [str(entry[4][0]) for entry in found]
    if not allow_private:
        for address in addresses:
            if not is_public(address):
                raise RefusedAddressError(f"{url.host} is {address}, which is private")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether anybody's: not private, loopback, link-local, multicast or kept for other uses."""
    parsed = ip_address(address.partition("%")[0])
    if isinstance(parsed, IPv6Address):
        if inner := _ipv4_within(parsed):
            return is_public(str(inner))
        if parsed not in EVERYBODYS:
            return False
    return parsed.is_global and not parsed.is_multicast


def _ipv4_within(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 host that it leads to, if it does to one."""
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour
