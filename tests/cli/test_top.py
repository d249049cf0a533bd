"""`conserve top` against a server of its feed, and against none."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from typer.testing import CliRunner

from conserve.cli.main import app as conserve
from conserve.server.dashboard.terminal import View, duration, events_in, plain, seconds

KEY = "only-key"
HOSTILE = "\x1b[2J\x1b]0;owned\x07[red]"


def event(name: str, data: object) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


CHAT = {"state": "safe", "text": "Chat is safe", "detail": "12 chat requests", "ttft_p50_s": 0.31}
CHAT |= {"ttft_p99_s": 1.04, "tbt_p50_s": 0.02, "tbt_p99_s": None}
SUMMARY = {
    "time_s": 1.0,
    "server": {"state": "serving", "text": "Serving.", "uptime_s": 3725},
    "chat": CHAT,
    "harvest": {"offline_tps": 1314.2},
    "requests": {"offline": {"running": 24, "waiting": 1200}},
    "memory": {"online_blocks": 10, "offline_blocks": 60, "free_blocks": 30},
    "yields": {"stopped_steps": 3, "displaced_requests": 1},
}
BATCH = {"id": "batch_1", "name": HOSTILE, "status": "in_progress", "progress": 0.5}
BATCH |= {"request_counts": {"completed": 20, "total": 40}, "deadline": None}
BATCH |= {"expires_at": 4e9, "deadline_state": "on_track", "estimated_finish_at": None}
COLUMNS = ["time_s", "online_tps", "offline_tps"]
FEED = (
    event("hello", {
        "facts": {"model": "m", "has_batches": True, "ttft_target_s": 1, "tbt_target_s": 0.2},
        "columns": COLUMNS, "fine": {"online_tps": [1.0], "offline_tps": [900.0]},
    })
    + event("tick", {"summary": SUMMARY, "fine": [[1.0, 50.0, 1000.0]], "coarse": []})
    + event("events", [{"time_s": 1.0, "kind": "yield", "text": "Displaced 3 requests."}])
    + event("batches", {"error": None, "data": [BATCH], "has_more": False})
    + event("tick", {"summary": SUMMARY, "fine": [[2.0, 60.0, 500.0]], "coarse": []})
    + event("bye", {"text": "The server is stopping."})
)  # fmt: skip


async def respond(scope: dict, receive: object, send: object) -> None:  # type: ignore[type-arg]
    assert scope["type"] == "http"
    status, body = 404, b"{}"
    if scope["path"] == "/dashboard/feed":
        status, body = 200, FEED.encode()
        if (b"authorization", f"Bearer {KEY}".encode()) not in scope["headers"]:
            status, body = 401, b'{"error": {"message": "This server wants a key."}}'
    await send({"type": "http.response.start", "status": status, "headers": []})  # type: ignore[operator]
    await send({"type": "http.response.body", "body": body})  # type: ignore[operator]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = uvicorn.Server(
        uvicorn.Config(respond, port=0, lifespan="off", log_level="error", ws="none")  # type: ignore[arg-type]
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
    assert "?[2J?]0;owned?[red]" in out


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


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "not-a-url"])
def test_a_server_that_is_away_is_told(address: str) -> None:
    code, _, err = top(address, "--once")
    assert code == 1
    assert address in err
    assert "Traceback" not in err


def test_the_last_minute_is_kept() -> None:
    view = View()
    for name, data in events_in(FEED.splitlines()):
        view.take(name, data)
    assert view.rates == [(1.0, 900.0), (50.0, 1000.0), (60.0, 500.0)]
    for _ in range(100):
        view.take("tick", {"summary": SUMMARY, "fine": [[3.0, 0.0, 0.0]], "coarse": []})
    assert len(view.rates) == 60


def test_words() -> None:
    assert [seconds(value) for value in (None, 0.0412, 1.5)] == ["-", "41 ms", "1.50 s"]
    assert [duration(value) for value in (0.4, 61, 90_000)] == ["0 s", "1 min 1 s", "1 d 1 h"]
    assert plain("a\nb").plain == "a?b"
