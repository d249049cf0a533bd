"""`conserve top` against a server of its feed, and against none."""

from __future__ import annotations

import io
import json
import os
import pty
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any, Literal, get_origin, get_type_hints

import pytest
import uvicorn
from msgspec import Struct, structs
from rich.console import Console
from typer.testing import CliRunner

from conserve.cli.main import app as conserve
from conserve.server.asgi import Receive, Scope, Send
from conserve.server.dashboard.messages import Batches, Bye, Message, Tick, encode
from conserve.server.dashboard.spans import span
from conserve.server.dashboard.terminal import View, messages_in, plain, screen, seconds
from tests.server.feed_scene import SUMMARY, messages, point

KEY = "only-key"
HOSTILE = "\x1b[2J\x1b]0;owned\x07[red]\u2028\u0085"


def fed(messages: Sequence[Message]) -> str:
    return "".join(encode(message).decode() for message in messages)


FEED = fed(messages(batch_name=HOSTILE))


async def respond(scope: Scope, receive: Receive, send: Send) -> None:
    assert scope["type"] == "http"
    status, body = 404, b"{}"
    if scope["path"] == "/other/dashboard/feed":
        status, body = 200, FEED.replace("uptime_s", "age_s").encode()
    if scope["path"] == "/leaving/dashboard/feed":
        status, body = (
            200,
            encode(messages("night run")[0]) + encode(Bye("The server is stopping.")),
        )
    if scope["path"] == "/dashboard/feed":
        status, body = 200, FEED.encode()
        if (b"authorization", f"Bearer {KEY}".encode()) not in scope["headers"]:
            status, body = 401, b'{"error": {"message": "This server wants a key."}}'
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = uvicorn.Server(
        uvicorn.Config(respond, port=0, lifespan="off", log_level="error", ws="none")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def top(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(conserve, ["top", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_once_says_what_the_page_says(url: str) -> None:
    code, out, _ = top(url, "--api-key", KEY, "--once")
    assert code == 0
    for words in ("Chat is safe", "1,314 tokens/s", "24 running, 1,200 waiting", "P99 1.04 s"):
        assert words in out
    for words in ("up 1 h 2 min", "offline 60%", "3 steps stopped", "batch_1", "20/40"):
        assert words in out
    assert "Displaced 3 requests." in out


def test_other_peoples_text_does_not_steer_the_terminal(url: str) -> None:
    _, out, _ = top(f"{url}/v1/", "--api-key", KEY, "--once")
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "?[2J?]0;owned?[red]??" in out


STEERS = "\x1b\x07\x9b\u202e"


def made_hostile(told: Any, kind: Any = None) -> Any:
    """The same record with STEERS in every text that is not one of a few words."""
    if isinstance(told, str):
        return told if isinstance(told, Enum) or get_origin(kind) is Literal else told + STEERS
    if isinstance(told, Struct):
        kinds = get_type_hints(type(told))
        changed = {name: made_hostile(getattr(told, name), kinds[name]) for name in kinds}
        return structs.replace(told, **changed)
    return [made_hostile(each) for each in told] if isinstance(told, list) else told


def drawn(told: Sequence[Message]) -> str:
    view, console = View(), Console(width=200, record=True, file=io.StringIO())
    for message in told:
        view.take(message)
    console.print(screen(view, console.width))
    return console.export_text()


def test_no_text_of_a_server_steers_the_terminal() -> None:
    """Whichever of its fields it stands in."""
    told = [made_hostile(message) for message in messages(batch_name="night run")]
    shown = drawn(told)
    assert set(STEERS).isdisjoint(shown)
    assert shown.count("?" * len(STEERS)) > 5
    failed = [*told, made_hostile(Batches("The database does not answer.", [], False))]
    assert "does not answer." + "?" * len(STEERS) in drawn(failed)


def test_json_is_one_object(url: str) -> None:
    code, out, _ = top(url, "--api-key", KEY, "--once", "--json")
    assert code == 0
    told = json.loads(out)
    assert told["chat"]["ttft_p99_s"] == 1.04
    assert told["batches"][0]["name"] == HOSTILE
    assert told["events"][0]["kind"] == "yield"


def test_json_without_once_is_a_line_a_tick(url: str) -> None:
    code, out, _ = top(url, "--api-key", KEY, "--json")
    assert code == 0
    (line,) = out.splitlines()  # the first tick comes before the batches are known
    assert json.loads(line)["facts"]["model"] == "m"


@pytest.mark.parametrize("key", [(), ("--api-key", "wrong")])
def test_a_wrong_key_is_told(url: str, key: tuple[str, ...]) -> None:
    code, out, err = top(url, *key, "--once")
    assert (code, out) == (1, "")
    assert err.strip() == "error: This server wants a key. (HTTP 401)"


def test_a_server_without_the_page_is_told(url: str) -> None:
    code, _, err = top(f"{url}/elsewhere", "--once")
    assert code == 1
    assert "has no live page" in err


def test_a_feed_of_another_version_is_told(url: str) -> None:
    code, _, err = top(f"{url}/other", "--once")
    assert code == 1
    told = " ".join(err.split())
    assert "/other/dashboard/feed is no feed that this version of conserve reads: " in told
    assert "`uptime_s`" in told


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "not-a-url"])
def test_a_server_that_is_away_is_told(address: str) -> None:
    code, _, err = top(address, "--once")
    assert code == 1
    assert address in err
    assert "Traceback" not in err


@pytest.mark.parametrize("words", [("--once",), ("--once", "--json"), ()])
def test_a_feed_that_ends_before_it_told_all_is_no_success(url: str, words: tuple[str]) -> None:
    code, out, err = top(f"{url}/leaving", *words)
    assert (code, out) == (1, "")
    assert f"{url}/leaving/dashboard/feed ended before it told all" in " ".join(err.split())


def on_terminal(kind: str, *words: str) -> tuple[int, str]:
    """Exit status of the command in a terminal of that TERM, and all that the terminal got."""
    main = "from conserve.cli.main import main; main()"
    pid, terminal = pty.fork()
    if not pid:
        os.environ.update(TERM=kind, COLUMNS="200")
        os.execv(sys.executable, [sys.executable, "-c", main, "top", *words])
    shown = b""
    try:
        while read := os.read(terminal, 65_536):
            shown += read
    except OSError:  # its other end is closed
        pass
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()


@pytest.mark.parametrize("place", ["http://127.0.0.1:9", "elsewhere", "leaving", "other", ""])
def test_what_ends_it_stays_on_the_terminal(url: str, place: str) -> None:
    """The live screen has a screen of its own, which is gone after it."""
    code, shown = on_terminal("xterm", place if place.startswith("http") else f"{url}/{place}")
    assert code == 1
    assert "error: " in shown.rpartition("\x1b[?1049l")[2]


def test_a_terminal_that_cannot_be_redrawn_is_told_once(url: str) -> None:
    code, shown = on_terminal("dumb", url, "--api-key", KEY)
    assert code == 0
    assert shown.count("Chat is safe") == 1
    assert "\x1b" not in shown


@pytest.mark.parametrize("columns", [30, 71, 72, 200])
def test_the_newest_second_is_at_the_right(columns: int) -> None:
    view, console = View(), Console(width=columns, file=io.StringIO())
    for message in messages("night run"):
        view.take(message)
    for rate in range(1, 61):
        view.take(Tick(SUMMARY, fine=[point(3.0, 0.0, float(rate))], coarse=[]))
    console.print(screen(view, columns))
    assert isinstance(console.file, io.StringIO)
    (bars,) = [
        line for line in console.file.getvalue().splitlines() if line.startswith("│ offline")
    ]
    assert bars.endswith("█ │")
    assert len(bars) == min(columns, 72)


def test_the_last_minute_is_kept() -> None:
    view = View()
    for message in messages_in(FEED.splitlines()):
        view.take(message)
    assert view.rates == [(1.0, 900.0), (50.0, 1000.0), (60.0, 500.0)]
    for _ in range(100):
        view.take(Tick(SUMMARY, fine=[point(3.0, 0.0, 0.0)], coarse=[]))
    assert len(view.rates) == 60


def test_words() -> None:
    assert [seconds(value) for value in (None, 0.0412, 1.5)] == ["-", "41 ms", "1.50 s"]
    assert [span(value) for value in (0.4, 61, 90_000)] == ["0 s", "1 min 1 s", "1 d 1 h"]
    assert plain("a\nb").plain == "a?b"
