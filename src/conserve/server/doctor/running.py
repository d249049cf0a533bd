"""What a server that runs says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx

from conserve.batch.connection import (
    BadKeyError,
    UnusableSettingError,
    authorization,
    client_for,
    needs_own_ca,
)
from conserve.server.doctor.finding import Finding

SECTION = "server"
LIMIT_S = 10.0
START_IT = "Start it, or correct --url."
NAME_CA = "Where a CA of your own signs its certificate, name the CA's file in SSL_CERT_FILE."


def running(url: str, api_key: str) -> Iterator[Finding]:
    """url: with or without /v1."""
    base = url.rstrip("/").removesuffix("/v1")
    try:
        headers = authorization(api_key)
        with client_for(base, base_url=base, headers=headers, timeout=LIMIT_S) as client:
            yield from _asked(client)
    except BadKeyError as error:
        yield Finding.problem(SECTION, "key", f"{error}", "Give another.")
    except (httpx.HTTPError, httpx.InvalidURL, UnusableSettingError) as error:
        fix = NAME_CA if needs_own_ca(error) else START_IT
        yield Finding.problem(SECTION, base, f"does not answer: {error}", fix)


def _asked(client: httpx.Client) -> Iterator[Finding]:
    base, health = str(client.base_url), client.get("/health")
    if health.is_success:
        yield Finding.ok(SECTION, base, "serves")
    else:
        fix = "Wait, where it starts or ends; else its log says why."
        yield Finding.problem(SECTION, base, f"/health answers {health.status_code}", fix)
    yield _vllm(client.get("/version"))
    yield _models(client.get("/v1/models"))
    yield _series(client.get("/metrics"))
    yield _route(client, "/v1/batches", "--no-batches")
    yield _route(client, "/dashboard", "--no-dashboard")


def _vllm(reply: httpx.Response) -> Finding:
    told = _json(reply).get("version", "")
    return Finding(SECTION, "vllm", str(told) or f"/version answers {reply.status_code}")


def _models(reply: httpx.Response) -> Finding:
    if reply.status_code in (401, 403):
        fix = "Give its key with --api-key or OPENAI_API_KEY."
        return Finding.problem(SECTION, "models", "the key is refused", fix)
    cards = _json(reply).get("data") or []
    told = [f"{card.get('id')} ({card.get('max_model_len')} tokens)" for card in cards]
    return Finding(SECTION, "models", ", ".join(told) or f"answers {reply.status_code}")


def _series(reply: httpx.Response) -> Finding:
    if "conserve:" in reply.text:
        return Finding.ok(SECTION, "scheduler", "ConServe's series are on /metrics")
    fix = "Start it with `conserve serve`, or see docs/serving.md for plain vLLM."
    told = "no series of ConServe on /metrics: another scheduler, or no metrics"
    return Finding.warning(SECTION, "scheduler", told, fix)


def _route(client: httpx.Client, path: str, flag: str) -> Finding:
    status = client.get(path).status_code
    if status == 404:
        return Finding(SECTION, path, f"off ({flag}, or no ConServe)")
    return Finding(SECTION, path, f"answers {status}")


def _json(reply: httpx.Response) -> dict[str, Any]:
    try:
        told = reply.json()
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}
