"""`conserve batch` against a real server process over the fake model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conserve.cli.batch import app
from conserve.cli.batch_view import print_batch, print_batches, progress_note
from tests.batch.batch_server import server
from tests.batch.builders import jsonl, line, numbered

runner = CliRunner()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server(tmp_path_factory.mktemp("served")) as one:
        assert one.wait()
        with one.client as client:
            yield str(client.base_url)


def run(*words: str, code: int = 0) -> Any:
    result = runner.invoke(app, list(words))
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def input_file(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(numbered(5) + jsonl([line("bad", "fail:400:9:cli")]))
    return path


def test_from_submit_to_results(url: str, input_file: Path, tmp_path: Path) -> None:
    at = ("--url", url, "--api-key", "cli")
    words = ("submit", str(input_file), "--wait", "--every-s", "0.05", "--priority", "3", "--json")
    batch = json.loads(run(*words, *at).stdout)
    assert (batch["status"], batch["priority"]) == ("completed", 3)
    assert batch["request_counts"] == {"total": 6, "completed": 5, "failed": 1}
    target = tmp_path / "out.jsonl"
    run("results", batch["id"], "-o", str(target), *at)
    assert len(target.read_text().splitlines()) == 5
    errors = run("results", batch["id"], "--errors", *at).stdout.splitlines()
    assert [json.loads(each)["custom_id"] for each in errors] == ["bad"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    shown = run("show", batch["id"], *at).stdout
    assert "completed" in shown
    assert "5 of 6 done, 1 failed" in shown
    assert json.loads(run("watch", batch["id"], "--json", *at).stdout)["id"] == batch["id"]
    assert batch["id"] in run("list", *at).stdout
    assert json.loads(run("list", "--json", "--limit", "1", *at).stdout)[0]["id"] == batch["id"]
    refused = run("cancel", batch["id"], *at, code=1)
    assert "Cannot cancel" in refused.stderr


def test_a_cancelled_batch_ends_watch_with_an_error(url: str, tmp_path: Path) -> None:
    at = ("--url", url.removesuffix("/v1/"), "--api-key", "cli")
    slow = tmp_path / "slow.jsonl"
    slow.write_bytes(jsonl([line("never", "fail:503:1000000:cli")]))
    batch = json.loads(run("submit", str(slow), "--json", *at).stdout)
    assert json.loads(run("cancel", batch["id"], "--json", *at).stdout)["status"] == "cancelling"
    ended = json.loads(run("watch", batch["id"], "--every-s", "0.05", "--json", *at, code=1).stdout)
    assert ended["status"] == "cancelled"
    assert "no output_file" in run("results", batch["id"], *at, code=1).stderr


def test_a_refused_file_shows_its_lines(url: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(jsonl([line("a"), line("a")]))
    words = ("submit", str(bad), "--wait", "--every-s", "0.05", "--url", url)
    assert "line 2: duplicate_custom_id" in run(*words, code=1).stdout


def test_validate_finds_what_the_server_would(input_file: Path, tmp_path: Path) -> None:
    assert "6 requests, 0 errors" in run("validate", str(input_file)).stdout
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(jsonl([line("a"), line("a")]) + b"{}\n")
    assert f"{bad}:2: duplicate_custom_id" in run("validate", str(bad), code=1).stdout
    found = json.loads(run("validate", str(bad), "--json", code=1).stdout)
    assert [error["line"] for error in found["errors"]] == [2, 3]
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"")
    assert "names no url" in run("validate", str(empty), code=1).stderr
    run("validate", str(tmp_path / "missing"), code=2)


def test_a_server_that_is_not_there_is_named(input_file: Path) -> None:
    result = run("submit", str(input_file), "--url", "http://127.0.0.1:9", code=1)
    assert "does not answer" in result.stderr
    assert "Traceback" not in result.output


OTHERS = {
    "id": "batch_of_another_server",
    "status": "in_progress",
    "endpoint": "/v1/chat/completions",
    "created_at": 1_700_000_000,
    "request_counts": {"total": 12_000, "completed": 1_500, "failed": 2},
}


def test_a_batch_without_our_fields_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    print_batch(OTHERS)
    print_batches([OTHERS, {**OTHERS, "request_counts": None}])
    shown = capsys.readouterr().out
    assert "1,500 of 12,000 done, 2 failed" in shown
    assert not any(word in shown for word in ("due", "speed", "None", "\x1b"))
    assert [len(row.split()) for row in shown.splitlines()[-2:]] == [7, 7]


def test_what_stands_beside_the_bar() -> None:
    assert progress_note(OTHERS) == "2 failed"
    ours = {**OTHERS, "tokens_per_second": 1319.7, "estimated_finish_at": 1_700_000_000}
    assert progress_note(ours).startswith("2 failed, 1,320 tokens/s, done about ")
    assert progress_note({"status": "validating"}) == ""


def test_an_unknown_batch_is_named(url: str) -> None:
    assert "No such Batch" in run("show", "batch_x", "--url", url, code=1).stderr
