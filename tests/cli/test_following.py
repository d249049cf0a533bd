"""A batch is followed over restarts of its server and a proxy's bad answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import typer

from conserve.cli.batch import _made
from conserve.cli.following import Looks, follow
from conserve.cli.remote import Server

ID = "batch_a"
Answer = httpx.Response | httpx.HTTPError


def state(status: str) -> httpx.Response:
    counts = {"total": 2, "completed": 1, "failed": 0}
    return httpx.Response(200, json={"id": ID, "status": status, "request_counts": counts})


def failed(status_code: int) -> httpx.Response:
    return httpx.Response(status_code, json={"error": {"message": "not now"}})


GATEWAY = httpx.Response(502, html="<h1>Bad gateway</h1>")
GONE = httpx.ConnectError("refused")
SILENT = httpx.ReadTimeout("silent")


class Script:
    """A server that answers as told, one after another."""

    def __init__(self, *answers: Answer) -> None:
        self._answers: Iterator[Answer] = iter(answers)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        answer = next(self._answers)
        if isinstance(answer, httpx.HTTPError):
            raise answer
        return answer

    def followed(self, patience_s: float = 600.0, heard_s: float | None = None) -> Any:
        with httpx.Client(transport=httpx.MockTransport(self), base_url="http://s/v1/") as client:
            return follow(Looks(Server(client), ID, patience_s, heard_s), every_s=0.0)


def test_a_server_that_comes_back_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    away: list[Answer] = [GONE, GATEWAY, failed(503), failed(504), failed(429), failed(500), SILENT]
    script = Script(state("in_progress"), *away, state("in_progress"), GONE, state("completed"))
    assert script.followed()["status"] == "completed"
    first, back, second, again = capsys.readouterr().err.splitlines()
    assert first == "http://s/v1/ does not answer: refused; waiting for the server"
    assert back == again == "the server is back"
    assert second == first


def test_one_that_stays_away_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    script = Script(state("in_progress"), GATEWAY)
    with pytest.raises(typer.Exit) as ended:
        script.followed(patience_s=0.0)
    assert ended.value.exit_code == 1
    assert "(HTTP 502); gave up after 0 s" in capsys.readouterr().err


@pytest.mark.parametrize("answer", [GONE, GATEWAY, failed(503)])
def test_one_that_has_never_answered_is_not_waited_for(
    answer: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit):
        Script(answer, state("completed")).followed()
    assert "gave up" not in capsys.readouterr().err


def test_one_that_has_just_made_the_batch_is_waited_for() -> None:
    script = Script(GONE, state("completed"))
    assert script.followed(heard_s=time.monotonic())["status"] == "completed"


@pytest.mark.parametrize(("status_code", "kept"), [(400, False), (429, False), (502, True)])
def test_the_file_of_a_batch_that_is_certainly_refused_goes(
    status_code: int, kept: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    deleted = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "DELETE":
            deleted.append(request.url.path)
        return failed(status_code)

    with (
        httpx.Client(transport=httpx.MockTransport(answer), base_url="http://s/v1/") as client,
        pytest.raises(typer.Exit),
    ):
        _made(Server(client), {"input_file_id": "file-a"})
    assert deleted == ([] if kept else ["/v1/files/file-a"])
    assert ("whether it began" in capsys.readouterr().err) == kept


@pytest.mark.parametrize("status_code", [400, 401, 403, 404])
def test_a_plain_no_is_final(status_code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        Script(state("in_progress"), failed(status_code), state("completed")).followed()
    assert capsys.readouterr().err == f"error: not now (HTTP {status_code})\n"
