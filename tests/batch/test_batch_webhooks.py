"""Owners are told of ends: signed, at least once, under one id, and at no private address."""

from __future__ import annotations

import asyncio
import base64
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from conserve.batch import webhooks
from conserve.batch.ids import tenant_of
from conserve.batch.lifecycle import Status
from conserve.batch.owner_limits import Limits
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from conserve.batch.webhook_endpoint import delay_s
from conserve.batch.webhooks import (
    GIVE_UP_S,
    RefusedAddressError,
    Webhook,
    allowed_address,
    is_public,
)
from tests.batch.batch_fakes import PATIENCE_S, FakeClock, FakeModel, eventually, running
from tests.batch.builders import TENANT, numbered, stored_batch, stored_file
from tests.batch.test_batch_quota import limits_file

pytestmark = pytest.mark.anyio

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


@dataclass
class Ear:
    """Answers each request with the next of `statuses`, and then with 200."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    heard: list[tuple[dict[str, str], bytes]] = field(default_factory=list)


@contextmanager
def listening(*statuses: int) -> Iterator[Ear]:
    ear = Ear(statuses=list(statuses))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            ear.heard.append(({name.lower(): v for name, v in self.headers.items()}, body))
            self.send_response(ear.statuses.pop(0) if ear.statuses else 200)
            self.send_header("location", ear.url)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    ear.url = f"http://127.0.0.1:{server.server_port}/hook?a=b"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield ear
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def hooked(folder: Path, url: str, *, allow_private: bool = True) -> Path:
    hook = {"url": url, "secret": SECRET, "allow_private": allow_private}
    return limits_file(folder, {"default": {"webhook": hook}})


async def cancelled(stores: Stores) -> str:
    """Id of a batch that has ended."""
    batch = await stored_batch(stores, await stored_file(stores, numbered(1)))
    await stores.batches.cancel(batch.tenant, batch.id)
    await stores.workers.enlist("w")
    job = await stores.jobs.claim("w")
    assert job is not None
    await stores.jobs.settle(job, Status.CANCELLED, {})
    await stores.workers.retire("w")
    return batch.id


async def opened(folder: Path, database_url: str, clock: FakeClock, limits: Path | None) -> Stores:
    settings = BatchSettings(data_dir=folder, database_url=database_url, owner_limits=limits)
    stores = Stores(settings, clock, clock)
    await stores.prepare()
    return stores


async def test_openais_client_takes_what_is_sent(tmp_path: Path) -> None:
    with listening() as ear:
        settings = BatchSettings(
            data_dir=tmp_path, poll_s=0.05, owner_limits=hooked(tmp_path, ear.url)
        )
        async with running(settings, FakeModel()) as run:
            batch = await run.submit(numbered(2))
            await eventually(lambda: bool(ear.heard))
        ((headers, body),) = ear.heard
    client = openai.OpenAI(api_key="any", webhook_secret=SECRET)
    event = client.webhooks.unwrap(body.decode(), headers)
    assert event.type == "batch.completed"
    assert event.data.id == batch.id
    assert headers["webhook-id"] == event.id
    forged = body.replace(b"completed", b"cancelled")
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(forged.decode(), headers)


async def test_it_is_tried_again_under_the_same_id_by_whoever_is_there(
    tmp_path: Path, database_url: str, clock: FakeClock
) -> None:
    with listening(500, 302) as ear:
        limits = hooked(tmp_path, ear.url)
        first = await opened(tmp_path, database_url, clock, limits)
        await cancelled(first)
        await first.webhooks.deliver()
        await first.webhooks.deliver()  # it is not due
        assert len(ear.heard) == 1
        await first.close()
        second = await opened(tmp_path, database_url, clock, limits)
        for attempt in (1, 2, 3):
            clock.advance(delay_s(attempt))
            await second.webhooks.deliver()
        await second.close()
    assert len(ear.heard) == 3  # the redirect was not followed, and the third try was the last
    assert len({headers["webhook-id"] for headers, _ in ear.heard}) == 1
    assert len({headers["webhook-timestamp"] for headers, _ in ear.heard}) == 3


async def test_two_servers_tell_it_once(
    tmp_path: Path, database_url: str, clock: FakeClock
) -> None:
    with listening() as ear:
        limits = hooked(tmp_path, ear.url)
        both = [await opened(tmp_path, database_url, clock, limits) for _ in range(2)]
        await cancelled(both[0])
        await asyncio.gather(*(stores.webhooks.deliver() for stores in both))
        for stores in both:
            await stores.close()
    assert len(ear.heard) == 1


@pytest.mark.parametrize("is_deleted", [False, True])
async def test_what_is_still_to_be_told_goes_with_its_owner(
    tmp_path: Path, database_url: str, clock: FakeClock, is_deleted: bool
) -> None:
    with listening() as ear:
        hook = {"url": ear.url, "secret": SECRET, "allow_private": True}
        owner, told = tenant_of("Bearer new"), {"webhook": hook}
        limits = limits_file(tmp_path, {owner: told, "default": told if is_deleted else {}})
        stores = await opened(tmp_path, database_url, clock, limits)
        await cancelled(stores)
        if is_deleted:
            await stores.owners.delete(TENANT)
        else:
            await stores.owners.move(TENANT, owner)
        await stores.webhooks.deliver()
        await stores.close()
    assert len(ear.heard) == (0 if is_deleted else 1)


async def test_a_private_address_is_not_asked(
    tmp_path: Path, database_url: str, clock: FakeClock
) -> None:
    with listening() as ear:
        limits = hooked(tmp_path, ear.url, allow_private=False)
        stores = await opened(tmp_path, database_url, clock, limits)
        await cancelled(stores)
        await stores.webhooks.deliver()
        clock.advance(GIVE_UP_S + 1)
        await stores.webhooks.deliver()  # given up
        hooked(tmp_path, ear.url)
        clock.advance(GIVE_UP_S)
        await stores.webhooks.deliver()
        await stores.close()
    assert ear.heard == []


async def test_a_careless_address_is_asked(
    tmp_path: Path, database_url: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: every address passes for public."""
    monkeypatch.setattr(webhooks, "is_public", lambda _address: True)
    with pytest.raises(AssertionError):
        await test_a_private_address_is_not_asked(tmp_path, database_url, clock)


async def test_a_name_that_leads_to_one_private_address_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found(*_: Any, **__: Any) -> Any:
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443))
            for address in ("93.184.216.34", "10.0.0.1")
        ]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    url = httpx.URL("https://rebound.example/")
    with pytest.raises(RefusedAddressError, match=r"rebound\.example is 10\.0\.0\.1"):
        await allowed_address(url, allow_private=False)
    assert await allowed_address(url, allow_private=True) == "93.184.216.34"


async def test_lookups_that_hang_keep_nobody_from_the_loops_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More of them than those are."""
    goes_on = threading.Event()

    def hang(*_: Any, **__: Any) -> Any:
        goes_on.wait()
        raise OSError("no name server")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    url = httpx.URL("https://a.example/")
    tries = [asyncio.create_task(allowed_address(url, allow_private=False)) for _ in range(64)]
    await asyncio.sleep(0)
    assert await asyncio.to_thread(lambda: "read") == "read"
    assert not any(each.done() for each in tries)
    goes_on.set()
    ends = await asyncio.gather(*tries, return_exceptions=True)
    assert all(isinstance(end, OSError) for end in ends)


async def test_lookups_that_outlive_their_tries_keep_no_other_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A minute's worth of them, where every name that may not answer hangs."""
    goes_on = threading.Event()

    def look_up(host: str, *_: Any, **__: Any) -> Any:
        if host == "dead.example":
            goes_on.wait()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 443))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    dead = httpx.URL("https://dead.example/")
    num_hung = int(60 / webhooks.TIMEOUT_S) * webhooks.DOUBTFUL_AT_ONCE
    hung = [
        asyncio.create_task(allowed_address(dead, allow_private=False)) for _ in range(num_hung)
    ]
    try:
        await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE_S):
            live = httpx.URL("https://live.example/")
            assert await allowed_address(live, allow_private=False) == "93.184.216.34"
        assert not any(each.done() for each in hung)
    finally:
        goes_on.set()
        await asyncio.gather(*hung)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "2002:7f00:1::",
        "::127.0.0.1",
        "::ffff:0:10.0.0.1",
        "fec0::1",
        "64:ff9b::10.0.0.1",
        "64:ff9b::169.254.169.254",
        "64:ff9b:1::10.0.0.1",
        "2001:db8::1",
    ],
)
def test_addresses_that_are_not_everybodys(address: str) -> None:
    assert not is_public(address)


def test_addresses_that_are() -> None:
    assert is_public("93.184.216.34")
    assert is_public("2606:2800:220:1:248:1893:25c8:1946")
    assert is_public("64:ff9b::93.184.216.34")  # as NAT64 has it
    assert is_public("::ffff:93.184.216.34")


async def test_certificates_are_read_once_and_not_in_the_loop(
    tmp_path: Path, database_url: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which answers chats meanwhile."""
    read_by = list[int]()
    read = ssl.create_default_context

    def reading(*args: Any, **kwargs: Any) -> ssl.SSLContext:
        read_by.append(threading.get_ident())
        return read(*args, **kwargs)

    monkeypatch.setattr(ssl, "create_default_context", reading)
    webhooks.certificates.cache_clear()
    with listening(500) as ear:
        stores = await opened(tmp_path, database_url, clock, hooked(tmp_path, ear.url))
        await cancelled(stores)
        for attempt in (1, 2):
            await stores.webhooks.deliver()
            clock.advance(delay_s(attempt))
        await stores.close()
    assert len(ear.heard) == 2
    assert len(read_by) == 1
    assert threading.get_ident() not in read_by


async def test_whatever_a_try_comes_to_it_is_put_off(
    tmp_path: Path, database_url: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of no kind that is known would end the whole service, again and again."""

    async def odd(*_: Any) -> int:
        raise ValueError("check_hostname requires server_hostname")

    monkeypatch.setattr(webhooks, "post", odd)
    with listening() as ear:
        stores = await opened(tmp_path, database_url, clock, hooked(tmp_path, ear.url))
        await cancelled(stores)
        await stores.webhooks.deliver()
        monkeypatch.undo()
        clock.advance(delay_s(1))
        await stores.webhooks.deliver()
        await stores.close()
    assert len(ear.heard) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"url": "ftp://a"}, "webhook.url: .*http or https"),
        ({"url": "https://a:b@c"}, "webhook.url: .*without a password"),
        ({"secret": "hush"}, "webhook.secret: .*at least 24 bytes in base64"),
        ({"uri": "https://b"}, "webhook.uri: must be one of url, secret, allow_private$"),
    ],
)
def test_a_hook_that_is_wrong_is_refused(tmp_path: Path, change: dict[str, str], says: str) -> None:
    hook = {"url": "https://a.example", "secret": SECRET, **change}
    with pytest.raises(ValueError, match=says) as caught:
        Limits(limits_file(tmp_path, {"default": {"webhook": hook}}), 10)
    assert "hush" not in str(caught.value)


def test_what_is_printed_of_limits_has_no_secret(tmp_path: Path) -> None:
    limits = Limits(hooked(tmp_path, "https://a.example"), 10)
    assert "a.example" in repr(limits.of("any"))
    assert SECRET not in repr(limits.of("any"))


async def test_without_a_hook_nothing_is_kept(stores: Stores) -> None:
    await cancelled(stores)
    await stores.webhooks.deliver()
    assert await stores.webhooks._store.owners() == []
    assert Webhook(url="https://a", secret=SECRET).key == bytes(range(32))
