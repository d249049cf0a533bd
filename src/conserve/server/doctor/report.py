"""All findings, in the order in which they are shown."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence

from conserve.server.doctor.environment import environment
from conserve.server.doctor.finding import Finding
from conserve.server.doctor.machine import machine
from conserve.server.doctor.model import model
from conserve.server.doctor.places import places
from conserve.server.doctor.running import running
from conserve.server.doctor.secrets import known_secrets, without
from conserve.server.doctor.versions import versions

PORT = 8000


def report(
    words: Sequence[str], environ: Mapping[str, str], url: str = "", api_key: str = ""
) -> list[Finding]:
    """words: of `conserve serve`. url: of a server to ask as well; empty asks none."""
    secrets = known_secrets(environ, words) | ({api_key} if api_key else set())
    return without(_found(words, environ, url, api_key), secrets)


def _found(
    words: Sequence[str], environ: Mapping[str, str], url: str, api_key: str
) -> Iterator[Finding]:
    args = _places_in(words)
    yield from versions()
    yield from machine()
    yield from environment(environ, words)
    yield from places(args, environ)
    if args.model:
        yield from model(words)
    if url:
        yield from running(url, api_key)


def _places_in(words: Sequence[str]) -> argparse.Namespace:
    """MODEL, which comes first, and the flags that name places; the rest is vLLM's to judge."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--model")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--data-dir")
    parser.add_argument("--served-model-name", nargs="+")
    args, _ = parser.parse_known_args(list(words))
    if words and not words[0].startswith("-"):
        args.model = words[0]
    return args
