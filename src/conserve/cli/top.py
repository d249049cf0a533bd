"""`conserve top [URL]`: the live page's figures in a terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import httpx
import typer
from rich.live import Live

from conserve.cli.failures import fail
from conserve.cli.output import for_tables
from conserve.cli.remote import DEFAULT_URL, KeyOption, authorization, connected, refused
from conserve.server.dashboard.messages import Message, Tick
from conserve.server.dashboard.terminal import View, messages_in, screen

SILENCE_S = 15.0
RETRY_S = 2.0


def top(
    url: Annotated[
        str, typer.Argument(envvar="CONSERVE_URL", help="The server, with or without /v1.")
    ] = DEFAULT_URL,
    api_key: KeyOption = "",
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a second, a line each.")
    ] = False,
) -> None:
    """Watch a ConServe server: is chat safe, and what is harvested?"""
    base = url.rstrip("/").removesuffix("/v1")
    view = View()
    if once or as_json or not sys.stdout.isatty():
        with _feed(base, api_key) as messages:
            _print(messages, view, once=once or not as_json, as_json=as_json)
        return
    _watch(base, api_key, view)


def _print(messages: Iterator[Message], view: View, *, once: bool, as_json: bool) -> None:
    for message in messages:
        view.take(message)
        if not view.complete or not (once or isinstance(message, Tick)):
            continue
        if as_json:
            typer.echo(json.dumps(view.as_json()))
        else:
            for_tables().print(screen(view))
        if once:
            return


def _watch(base: str, api_key: str, view: View) -> None:
    """Until Ctrl-C. A server that goes away after it was there is waited for."""
    with Live(screen=True, auto_refresh=False) as live:
        while True:
            try:
                with _feed(base, api_key) as messages:
                    for message in messages:
                        view.take(message)
                        if view.complete:
                            live.update(screen(view), refresh=True)
            except typer.Exit:
                if not view.complete:
                    raise
            except KeyboardInterrupt:
                return
            live.update(f"{base} does not answer; trying again. Ctrl-C ends.", refresh=True)
            time.sleep(RETRY_S)


@contextmanager
def _feed(base: str, api_key: str) -> Iterator[Iterator[Message]]:
    """What the feed says. Ends the command with one clear line where there is none."""
    headers, limits = authorization(api_key), httpx.Timeout(10, read=SILENCE_S)
    try:
        with (
            connected(base, headers=headers, timeout=limits) as client,
            client.stream("GET", f"{base}/dashboard/feed") as feed,
        ):
            if feed.status_code == 404:
                raise fail(f"{base} has no live page: it is no ConServe, or runs --no-dashboard")
            if feed.is_error:
                raise refused(feed)
            yield messages_in(feed.iter_lines())
    except httpx.UnsupportedProtocol:
        raise fail(f"{base} is no URL; one begins with http:// or https://") from None
    except httpx.HTTPError as error:
        raise fail(f"{base} does not answer: {error}") from None
    except ValueError as error:
        told = f"{base}/dashboard/feed is no feed that this version of conserve reads"
        raise fail(f"{told}: {error}") from None
