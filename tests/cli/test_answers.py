"""What answers and is no server of batches, and what cannot be used to reach one: one line."""

from __future__ import annotations

import io
from pathlib import Path

import httpx
import pytest
import typer
from typer.testing import CliRunner

from conserve.cli.main import app
from conserve.cli.remote import Server

BASE = "http://s/v1/"
HTML = {"content-type": "text/html"}
SOMETHING_ELSE = "http://s/v1/batches answers something else; is it a /v1 URL?"
MOVED = httpx.Response(301, headers={"location": "https://s/v1/batches"})


def asked(answer: httpx.Response | httpx.HTTPError, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command that asks for the batches ends with."""

    def respond(_: httpx.Request) -> httpx.Response:
        if isinstance(answer, httpx.HTTPError):
            raise answer
        return answer

    client = httpx.Client(transport=httpx.MockTransport(respond), base_url=BASE)
    with client, pytest.raises(typer.Exit) as ended:
        Server(client).call("GET", "batches")
    assert ended.value.exit_code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (httpx.Response(200, text="<p>hello", headers=HTML), SOMETHING_ELSE),
        (httpx.Response(200, content="Gäste".encode("latin-1"), headers=HTML), SOMETHING_ELSE),
        (httpx.Response(200, json=[1]), SOMETHING_ELSE),
        (httpx.Response(200, json={"detail": "hello"}), SOMETHING_ELSE),
        (MOVED, "http://s/v1/batches redirects to https://s/v1/batches; correct --url (HTTP 301)"),
        (
            httpx.Response(404, json={"detail": "Not Found"}),
            "there is no http://s/v1/batches: another server, or one without this (HTTP 404)",
        ),
        (httpx.Response(502, text="<h1>\r\n502</h1>", headers=HTML), "Bad Gateway (HTTP 502)"),
        (httpx.Response(403, text="not you\n"), "not you (HTTP 403)"),
        (httpx.Response(403, json={"error": {"message": "no"}}), "no (HTTP 403)"),
    ],
)
def test_an_answer_that_is_none_of_ours(
    answer: httpx.Response, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(answer, capsys) == says


def test_a_certificate_of_an_own_ca_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    error = httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed")
    assert "name its file in SSL_CERT_FILE" in asked(error, capsys)


def test_results_that_are_kept_elsewhere_are_fetched_there_without_the_key() -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        if request.url.host == "s":
            assert request.headers["authorization"] == "Bearer key"
            return httpx.Response(302, headers={"location": "https://store/f"}, text="elsewhere")
        assert "authorization" not in request.headers
        return httpx.Response(200, content=b"{}\n")

    headers, target = {"authorization": "Bearer key"}, io.BytesIO()
    transport = httpx.MockTransport(respond)
    with httpx.Client(transport=transport, base_url=BASE, headers=headers) as client:
        Server(client).save("file-a", target)
    assert target.getvalue() == b"{}\n"


def test_an_id_is_one_part_of_the_path() -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        assert request.url.raw_path == b"/v1/batches/..%2Fx%3Fy%0A"
        return httpx.Response(200, json={"id": "a"})

    with httpx.Client(transport=httpx.MockTransport(respond), base_url=BASE) as client:
        Server(client).batch("../x?y\n")


def ended(*words: str, code: int = 1) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    return " ".join(result.stderr.replace("│", " ").split())


COMMANDS = [("batch", "list", "--url"), ("usage", "--url"), ("top",)]


@pytest.mark.parametrize("command", COMMANDS)
def test_certificates_that_cannot_be_read(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for file, why in ((tmp_path / "none.pem", "No such file"), (Path(__file__), "no certificate")):
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        told = ended(*command, "https://127.0.0.1:9")
        assert f"SSL_CERT_FILE: no certificates can be read from '{file}'" in told
        assert why in told


def test_a_proxy_that_is_no_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://host:abc")
    assert "HTTP_PROXY, HTTPS_PROXY or ALL_PROXY: Invalid port" in ended(
        "batch", "list", "--url", "http://example.invalid"
    )


@pytest.mark.parametrize("command", ["show", "watch", "cancel", "pause", "resume", "results"])
def test_an_id_that_an_empty_variable_gave(command: str) -> None:
    assert "BATCH" in (told := ended("batch", command, "", code=2))
    assert "it is empty" in told
