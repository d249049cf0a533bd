"""HTTP clients: past the environment's proxies to this machine, through them to any other; with a
key where one is given.

A proxy (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY) cannot reach what listens on this machine's loopback.
"""

from __future__ import annotations

import os
from ipaddress import ip_address
from typing import Any

import httpx


class UnusableSettingError(ValueError):
    """The environment names a proxy or certificates that cannot be used; the message says what to
    do."""


# What httpx raises of the environment, where the URL is one.
UNUSABLE = (ImportError, ValueError, httpx.InvalidURL, OSError)


class BadKeyError(ValueError):
    """An API key that no request can carry; the message does not repeat it."""


def authorization(api_key: str) -> dict[str, str]:
    """The header with a key, or none. Raises BadKeyError."""
    key = api_key.strip()  # one that was read from a file ends with its line
    if not (key.isascii() and key.isprintable()):
        raise BadKeyError("--api-key or OPENAI_API_KEY has characters that no header may have")
    return {"authorization": f"Bearer {key}"} if key else {}


def client_for(url: str, **options: Any) -> httpx.Client:
    """A client of the server at `url`; `options` are httpx.Client's.

    Raises UnusableSettingError, and httpx.InvalidURL where `url` is none.
    """
    httpx.URL(url)
    try:
        return httpx.Client(**_settings(url), **options)
    except UNUSABLE as error:
        raise _explained(error) from error


def async_client_for(url: str, **options: Any) -> httpx.AsyncClient:
    """As `client_for`, for asyncio."""
    httpx.URL(url)
    try:
        return httpx.AsyncClient(**_settings(url), **options)
    except UNUSABLE as error:
        raise _explained(error) from error


def needs_own_ca(error: Exception) -> bool:
    """Whether a server could not be asked since nobody that is known signs its certificate."""
    return "CERTIFICATE_VERIFY_FAILED" in str(error)


def is_loopback(url: str) -> bool:
    """Whether `url` leads to this machine without a network."""
    try:
        host = httpx.URL(url).host
    except httpx.InvalidURL:
        return False
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _settings(url: str) -> dict[str, Any]:
    if not is_loopback(url):
        return {}
    # trust_env is about certificates too, and a user's own may be what signs https://localhost.
    return {"trust_env": False, "verify": httpx.create_ssl_context()}


def _explained(error: Exception) -> UnusableSettingError:
    """httpx raises ImportError for a SOCKS proxy without its package, OSError for a file of
    certificates that it cannot read."""
    if isinstance(error, OSError):
        file = os.environ.get("SSL_CERT_FILE")
        why = error.strerror or error
        return UnusableSettingError(
            f"SSL_CERT_FILE: no certificates can be read from {file!r}: {why}"
        )
    if isinstance(error, ImportError):
        return UnusableSettingError(
            "the environment names a SOCKS proxy (ALL_PROXY, HTTP_PROXY or HTTPS_PROXY), which "
            "needs the package socksio: install it, or unset the variable"
        )
    return UnusableSettingError(f"HTTP_PROXY, HTTPS_PROXY or ALL_PROXY: {error}")
