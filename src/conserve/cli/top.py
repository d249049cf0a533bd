"""`conserve top [URL]`: the live page's figures in a terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated

import httpx
import typer
from rich.live import Live

from conserve.batch.connection import UnusableSettingError, client_for
from conserve.cli.failures import fail
from conserve.cli.output import Output, for_tables
from conserve.cli.remote import DEFAULT_URL, KeyOption, authorization, why, words_of
from conserve.server.dashboard.messages import Message, Tick
from conserve.server.dashboard.terminal import View, messages_in, plain, screen

SILENCE_S = 15.0
RETRY_S = 2.0


class FeedError(Exception):
    """There is no feed, or none that can be read; the message says why."""


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
    base, headers = url.rstrip("/").removesuffix("/v1"), authorization(api_key)
    try:
        if once or as_json or not _can_redraw():
            _print(base, headers, once=once or not as_json, as_json=as_json)
        else:
            _watch(base, headers)
    except FeedError as error:
        raise fail(str(error)) from None


def _can_redraw() -> bool:
    """A dumb terminal cannot."""
    console = Output()
    return console.is_terminal and not console.is_dumb_terminal


def _print(base: str, headers: dict[str, str], *, once: bool, as_json: bool) -> None:
    view = View()
    for message in _told(base, headers, view):
        if not view.complete or not (once or isinstance(message, Tick)):
            continue
        if as_json:
            typer.echo(json.dumps(view.as_json()))
        else:
            console = for_tables()
            console.print(screen(view, console.width))
        if once:
            return


def _watch(base: str, headers: dict[str, str]) -> None:
    """Until Ctrl-C. A server that goes away after it was there is waited for.

    What ends the command is said by its caller: what is printed here goes with the live screen.
    """
    view = View()
    with suppress(KeyboardInterrupt), Live(screen=True, auto_refresh=False) as live:
        while True:
            away = f"{base} has ended its feed"
            try:
                for _ in _told(base, headers, view):
                    if view.complete:
                        live.update(screen(view, live.console.width), refresh=True)
            except FeedError as error:
                if not view.complete:
                    raise
                away = str(error)
            live.update(plain(f"{away}; trying again. Ctrl-C ends."), refresh=True)
            time.sleep(RETRY_S)


def _told(base: str, headers: dict[str, str], view: View) -> Iterator[Message]:
    """What the feed says, which `view` has taken. Raises FeedError."""
    with _feed(base, headers) as messages:
        for message in messages:
            view.take(message)
            yield message
    if not view.complete:
        raise FeedError(f"{base}/dashboard/feed ended before it told all: no ConServe, or it stops")


@contextmanager
def _feed(base: str, headers: dict[str, str]) -> Iterator[Iterator[Message]]:
    """Raises FeedError where there is none, also in the block."""
    limits = httpx.Timeout(10, read=SILENCE_S)
    try:
        with (
            client_for(base, headers=headers, timeout=limits) as client,
            client.stream("GET", f"{base}/dashboard/feed") as feed,
        ):
            if feed.status_code == 404:
                told = f"{base} has no live page: it is no ConServe, or runs --no-dashboard"
                raise FeedError(told)
            if not feed.is_success:
                raise FeedError(words_of(feed))
            yield messages_in(feed.iter_lines())
    except httpx.UnsupportedProtocol:
        raise FeedError(f"{base} is no URL; one begins with http:// or https://") from None
    except httpx.InvalidURL as error:
        raise FeedError(f"{base} is no URL: {error}") from None
    except httpx.HTTPError as error:
        raise FeedError(f"{base} does not answer: {why(error)}") from None
    except UnusableSettingError as error:
        raise FeedError(str(error)) from None
    except ValueError as error:
        told = f"{base}/dashboard/feed is no feed that this version of conserve reads"
        raise FeedError(f"{told}: {error}") from None
