"""A server elsewhere, as commands name and ask it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO

import httpx
import typer

from conserve.batch import connection
from conserve.cli.failures import fail

DEFAULT_URL = "http://127.0.0.1:8000"
CHUNK_BYTES = 65_536
TOO_MANY = 429
# Request timeout, too early, too many requests.
NOT_NOW = (408, 425, TOO_MANY)

UrlOption = Annotated[
    str, typer.Option(envvar="CONSERVE_URL", help="The server, with or without /v1.")
]
KeyOption = Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="Its API key.")]


class AwayError(Exception):
    """The server is not reached, or it or a proxy before it says that it cannot answer now.
    `is_refusal` where it has certainly not done what it was asked."""

    def __init__(self, message: str, *, is_refusal: bool = False) -> None:
        super().__init__(message)
        self.is_refusal = is_refusal


@dataclass
class Server:
    """The few calls the commands need. Ends the command with one clear line where one fails."""

    client: httpx.Client

    def call(self, method: str, path: str, **request: Any) -> Any:
        """What the server answers, as JSON."""
        try:
            return self.ask(method, path, **request)
        except AwayError as error:
            raise fail(str(error)) from None

    def ask(self, method: str, path: str, **request: Any) -> Any:
        """As `call`; but raises AwayError where asking again may help."""
        try:
            response = self.client.request(method, path, **request)
        except httpx.UnsupportedProtocol:
            raise fail(f"{self.client.base_url} is no URL; one begins with http://") from None
        except httpx.InvalidURL as error:
            raise fail(f"{path!r} cannot be asked for: {error}") from None
        except httpx.HTTPError as error:
            raise AwayError(f"{self.client.base_url} does not answer: {error}") from None
        if response.is_server_error or response.status_code in NOT_NOW:
            is_refusal = response.status_code == TOO_MANY
            raise AwayError(words_of(response), is_refusal=is_refusal)
        if response.is_error:
            raise refused(response)
        try:
            return response.json()
        except json.JSONDecodeError:
            raise fail(f"{self.client.base_url}{path} answers no JSON; is it a /v1 URL?") from None

    def batch(self, batch_id: str) -> Any:
        return self.call("GET", f"batches/{batch_id}")

    def discard(self, file_id: str) -> None:
        """Delete a file, if the server lets us."""
        with suppress(httpx.HTTPError):
            self.client.delete(f"files/{file_id}")

    def save(self, file_id: str, target: BinaryIO) -> None:
        try:
            with self.client.stream("GET", f"files/{file_id}/content") as response:
                if response.is_error:
                    raise refused(response)
                for chunk in response.iter_bytes(CHUNK_BYTES):
                    target.write(chunk)
        except httpx.HTTPError as error:
            raise fail(f"the download broke off: {error}") from None


@contextmanager
def server(url: str, api_key: str) -> Iterator[Server]:
    base = url.rstrip("/")
    base = base if base.endswith("/v1") else f"{base}/v1"
    headers = authorization(api_key)
    with connected(base, base_url=f"{base}/", headers=headers, timeout=600) as client:
        yield Server(client)


def connected(url: str, **options: Any) -> httpx.Client:
    """A client of the server at `url`. Ends the command where that is none, or a proxy cannot be
    used."""
    try:
        httpx.URL(url)
        return connection.client_for(url, **options)
    except httpx.InvalidURL as error:
        raise fail(f"{url} is no URL: {error}") from None
    except connection.ProxyError as error:
        raise fail(str(error)) from None


def authorization(api_key: str) -> dict[str, str]:
    """The header with a key. Ends the command where it can be in none."""
    try:
        return connection.authorization(api_key)
    except connection.BadKeyError as error:
        raise fail(str(error)) from None


def refused(response: httpx.Response) -> typer.Exit:
    """Say what the server says of an error; to be raised."""
    return fail(words_of(response))


def words_of(response: httpx.Response) -> str:
    """An error in the server's own words where it has some, with its status."""
    response.read()
    try:
        words = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        words = response.text[:200] or response.reason_phrase
    return f"{words} (HTTP {response.status_code})"
