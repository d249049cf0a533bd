"""A server elsewhere, as commands name and ask it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO
from urllib.parse import quote

import httpx
import typer

from conserve.batch import connection
from conserve.cli.failures import fail

DEFAULT_URL = "http://127.0.0.1:8000"
CHUNK_BYTES = 65_536
NOT_FOUND, TOO_MANY = 404, 429
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
        except httpx.HTTPError as error:
            raise AwayError(f"{self.client.base_url} does not answer: {why(error)}") from None
        if response.is_server_error or response.status_code in NOT_NOW:
            is_refusal = response.status_code == TOO_MANY
            raise AwayError(words_of(response), is_refusal=is_refusal)
        if not response.is_success:
            raise fail(words_of(response))
        return _told(response)

    def batch(self, batch_id: str) -> Any:
        return self.call("GET", batch_path(batch_id))

    def discard(self, file_id: str) -> None:
        """Delete a file, if the server lets us."""
        with suppress(httpx.HTTPError):
            self.client.delete(f"files/{file_id}")

    def save(self, file_id: str, target: BinaryIO) -> None:
        try:
            path = f"files/{file_id}/content"
            # Others keep files elsewhere; httpx does not send the key to another place.
            with self.client.stream("GET", path, follow_redirects=True) as response:
                if not response.is_success:
                    raise fail(words_of(response))
                for chunk in response.iter_bytes(CHUNK_BYTES):
                    target.write(chunk)
        except httpx.HTTPError as error:
            raise fail(f"the download broke off: {why(error)}") from None


def batch_path(batch_id: str) -> str:
    return f"batches/{quote(batch_id, safe='')}"


def _told(response: httpx.Response) -> Any:
    """An object or a list of them, as every answer of OpenAI's API; ends the command where it is
    something else."""
    try:
        told = response.json()
    except ValueError:
        told = None
    if isinstance(told, dict) and ("id" in told or isinstance(told.get("data"), list)):
        return told
    raise fail(f"{response.url.copy_with(query=None)} answers something else; is it a /v1 URL?")


@contextmanager
def server(url: str, api_key: str) -> Iterator[Server]:
    base = url.rstrip("/")
    base = base if base.endswith("/v1") else f"{base}/v1"
    headers = authorization(api_key)
    with connected(base, base_url=f"{base}/", headers=headers, timeout=600) as client:
        yield Server(client)


def connected(url: str, **options: Any) -> httpx.Client:
    """A client of the server at `url`. Ends the command where there can be none."""
    try:
        return connection.client_for(url, **options)
    except httpx.InvalidURL as error:
        raise fail(f"{url} is no URL: {error}") from None
    except connection.UnusableSettingError as error:
        raise fail(str(error)) from None


def why(error: httpx.HTTPError) -> str:
    """What httpx says, with the way out where it is ours to know."""
    if connection.needs_own_ca(error):
        return f"{error}; where a CA of your own signs it, name its file in SSL_CERT_FILE"
    return str(error) or type(error).__name__


def authorization(api_key: str) -> dict[str, str]:
    """The header with a key. Ends the command where it can be in none."""
    try:
        return connection.authorization(api_key)
    except connection.BadKeyError as error:
        raise fail(str(error)) from None


def words_of(response: httpx.Response) -> str:
    """An error in the server's own words where it has some, with its status; where a redirect
    leads."""
    response.read()
    try:
        words = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        words = _other_words(response)
    return f"{words} (HTTP {response.status_code})"


def _other_words(response: httpx.Response) -> str:
    if response.has_redirect_location:
        place = response.headers["location"][:200]
        return f"{response.url} redirects to {place}; correct --url"
    if response.status_code == NOT_FOUND:
        return f"there is no {response.url}: another server, or one without this"
    is_page = "html" in response.headers.get("content-type", "")
    return (not is_page and response.text[:200].strip()) or response.reason_phrase
