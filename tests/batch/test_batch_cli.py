"""`conserve batch` against a real server process over the fake model."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from conserve.cli.batch import app
from conserve.cli.batch_view import print_batch, print_batches, progress_bar, progress_note
from conserve.cli.failures import fail
from conserve.cli.main import app as commands
from tests.batch.batch_server import ROOT, server
from tests.batch.builders import jsonl, line, numbered

runner = CliRunner()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server(tmp_path_factory.mktemp("served")) as one:
        assert one.wait()
        with one.client as client:
            yield str(client.base_url)


def run(*words: str, code: int = 0) -> Any:
    return run_of(app, *words, code=code)


def run_of(command: Any, *words: str, code: int = 0) -> Any:
    result = runner.invoke(command, list(words))
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
    submitted = run(*words, *at)
    batch = json.loads(submitted.stdout)
    assert f"`conserve batch watch {batch['id']}` comes back to it" in submitted.stderr
    assert (batch["status"], batch["priority"]) == ("completed", 3)
    assert batch["request_counts"] == {"total": 6, "completed": 5, "failed": 1}
    target = tmp_path / "out.jsonl"
    run("results", batch["id"], "-o", str(target), *at)
    assert len(target.read_text().splitlines()) == 5
    assert run("results", batch["id"], "-o", "-", *at).stdout == target.read_text()
    errors = run("results", batch["id"], "--errors", *at).stdout.splitlines()
    assert [json.loads(each)["custom_id"] for each in errors] == ["bad"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    shown = run("show", batch["id"], *at).stdout
    assert "completed" in shown
    assert "5 of 6 done, 1 failed" in shown
    assert json.loads(run("watch", batch["id"], "--json", *at).stdout)["id"] == batch["id"]
    assert batch["id"] in run("list", *at).stdout
    (day,) = json.loads(run_of(commands, "usage", "--json", "--days", "2", *at).stdout)[-1:]
    assert day["completed"] >= 5
    assert day["date"] in run_of(commands, "usage", *at).stdout
    assert json.loads(run("list", "--json", "--limit", "1", *at).stdout)[0]["id"] == batch["id"]
    refused = run("cancel", batch["id"], *at, code=1)
    assert "Cannot cancel" in refused.stderr


def test_pause_and_resume(url: str, tmp_path: Path) -> None:
    at = ("--url", url, "--api-key", "cli")
    path = tmp_path / "in.jsonl"
    path.write_bytes(jsonl([line("waits", f"fail:503:{10**9}:paused")]))
    batch_id = json.loads(run("submit", str(path), "--json", *at).stdout)["id"]
    assert json.loads(run("pause", batch_id, "--json", *at).stdout)["paused_at"]
    assert "paused" in run("show", batch_id, *at).stdout
    assert "paused" not in run("resume", batch_id, *at).stdout
    run("cancel", batch_id, *at)
    assert "Cannot pause" in run("pause", batch_id, *at, code=1).stderr


def test_a_cancelled_batch_ends_watch_with_an_error(url: str, tmp_path: Path) -> None:
    at = ("--url", url.removesuffix("/v1/"), "--api-key", "cli")
    slow = tmp_path / "slow.jsonl"
    slow.write_bytes(jsonl([line("never", "fail:503:1000000:cli")]))
    batch = json.loads(run("submit", str(slow), "--json", *at).stdout)
    assert json.loads(run("cancel", batch["id"], "--json", *at).stdout)["status"] == "cancelling"
    ended = json.loads(run("watch", batch["id"], "--every-s", "0.05", "--json", *at, code=1).stdout)
    assert ended["status"] == "cancelled"
    told = run("results", batch["id"], *at, code=1).stderr
    assert f"{batch['id']} is cancelled and has no output_file\n" in told


def test_a_refused_file_shows_its_lines(url: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(jsonl([line("a"), line("a")]))
    words = ("submit", str(bad), "--wait", "--every-s", "0.05", "--url", url)
    assert "line 2: duplicate_custom_id" in run(*words, code=1).stdout


def test_a_batch_in_which_nothing_succeeded_is_no_success(url: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(jsonl([line(name, f"fail:400:9:{name}") for name in "abc"]))
    at = ("--url", url)
    ended = run("submit", str(bad), "--wait", "--every-s", "0.05", "--json", *at, code=1)
    batch = json.loads(ended.stdout)
    assert batch["status"] == "completed"
    way = f"none of its 3 requests succeeded; see `conserve batch results {batch['id']} --errors`"
    assert ended.stderr.endswith(f"error: {way}\n")
    assert way in run("watch", batch["id"], *at, code=1).stderr
    assert way in run("results", batch["id"], *at, code=1).stderr
    errors = run("results", batch["id"], "--errors", *at).stdout.splitlines()
    assert {json.loads(each)["response"]["status_code"] for each in errors} == {400}


def files_at(url: str) -> int:
    return len(httpx.get(f"{url}files?limit=1000").json()["data"])


def test_what_the_server_would_refuse_leaves_no_file(url: str, tmp_path: Path) -> None:
    azure, other = tmp_path / "azure.jsonl", tmp_path / "other.jsonl"
    azure.write_bytes(jsonl([line("a", url="/chat/completions")]))
    other.write_bytes(jsonl([line("a", url="/v1/moderations")]))
    before = files_at(url)
    told = run("submit", str(azure), "--url", url, code=1).stderr
    assert "url is '/chat/completions'; it must be /v1/chat/completions" in told
    assert "(HTTP 400)" in run("submit", str(other), "--url", url, code=1).stderr
    good = tmp_path / "good.jsonl"
    good.write_bytes(numbered(1))
    assert "(HTTP 400)" in run("submit", str(good), "--window", "x", "--url", url, code=1).stderr
    assert files_at(url) == before


def test_a_pipe_is_submitted_whole(url: str) -> None:
    words = ("batch", "submit", "-", "--wait", "--every-s", "0.05", "--json", "--url", url)
    done = conserve(*words, stdin=numbered(200))
    assert json.loads(done.stdout)["request_counts"]["completed"] == 200


def conserve(*words: str, stdin: bytes = b"", code: int = 0, **to: Any) -> Any:
    """The command in a process of its own, with real standard output."""
    command = [sys.executable, "-c", "from conserve.cli.main import main; main()", *words]
    to.setdefault("stdout", subprocess.PIPE)
    done = subprocess.run(command, input=stdin, stderr=subprocess.PIPE, cwd=ROOT, **to)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def ended(url: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Id of a batch whose output is more than a pipe holds."""
    file = tmp_path_factory.mktemp("long") / "in.jsonl"
    file.write_bytes(numbered(2000))
    words = ("submit", str(file), "--wait", "--every-s", "0.05", "--json", "--url", url)
    return str(json.loads(run(*words).stdout)["id"])


@pytest.mark.parametrize("what", ["results", "show", "list"])
def test_a_reader_that_goes_ends_it_in_silence(url: str, ended: str, what: str) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    words = ("batch", what, *([] if what == "list" else [ended]), "--url", url)
    done = conserve(*words, stdout=theirs, code=128 + signal.SIGPIPE)
    os.close(theirs)
    assert done.stderr == b""


@pytest.mark.parametrize("what", ["results", "show", "list"])
def test_what_cannot_be_printed_is_one_line(url: str, ended: str, what: str) -> None:
    words = ("batch", what, *([] if what == "list" else [ended]), "--url", url)
    with open("/dev/full", "wb") as full:
        done = conserve(*words, stdout=full, code=1)
    assert done.stderr == b"error: cannot write: No space left on device\n"


def test_results_keep_what_they_are_written_to(url: str, ended: str, tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    run("results", ended, "-o", str(link), "--url", url)
    reader.join()
    assert len(found[0].splitlines()) == 2000
    assert pipe.is_fifo()
    assert link.is_symlink()
    missing = run("results", ended, "-o", str(tmp_path / "no/out.jsonl"), "--url", url, code=1)
    assert "no/out.jsonl: No such file or directory" in missing.stderr


def test_validate_finds_what_the_server_would(input_file: Path, tmp_path: Path) -> None:
    assert "6 requests, 0 errors" in run("validate", str(input_file)).stdout
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(jsonl([line("a"), line("a")]) + b"{}\n")
    assert f"{bad}:2: duplicate_custom_id" in run("validate", str(bad), code=1).stdout
    found = json.loads(run("validate", str(bad), "--json", code=1).stdout)
    assert [error["line"] for error in found["errors"]] == [2, 3]
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"")
    assert f"{empty}:1: empty_file" in run("validate", str(empty), code=1).stdout
    run("validate", str(tmp_path / "missing"), code=2)
    run("validate", str(tmp_path), code=2)


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


HOSTILE = "\x1b[2J\x9b31m\u202e\r\n[bold]:skull:[/nothing]"
SHOWN = "?[2J?31m???[bold]:skull:[/nothing]"


def test_other_peoples_words_do_not_steer_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    errors = {"data": [{"code": HOSTILE, "message": HOSTILE, "line": 1}]}
    names = ("id", "status", "endpoint", "model", "output_file_id")
    batch = {**OTHERS, **dict.fromkeys(names, HOSTILE), "errors": errors}
    print_batch(batch)
    print_batches([batch])
    fail(HOSTILE)
    shown = capsys.readouterr()
    assert shown.out.count(SHOWN) == 9
    assert shown.err == f"error: {SHOWN}\n"
    assert all(letter.isprintable() or letter == "\n" for letter in shown.out)


def test_a_bar_shows_words_as_they_are() -> None:
    console = Console(force_terminal=True, width=200, file=io.StringIO(), color_system=None)
    with console.capture() as captured, progress_bar(console) as progress:
        progress.add_task("[/nothing]", total=None, note="[/more]")
        progress.refresh()
    assert "[/nothing]" in captured.get()
    assert "[/more]" in captured.get()


def test_what_stands_beside_the_bar() -> None:
    assert progress_note(OTHERS) == "2 failed"
    ours = {**OTHERS, "tokens_per_second": 1319.7, "estimated_finish_at": 1_700_000_000}
    assert progress_note(ours).startswith("2 failed, 1,320 tokens/s, done about ")
    assert progress_note({"status": "validating"}) == ""


def test_an_unknown_batch_is_named(url: str) -> None:
    assert "No such Batch" in run("show", "batch_x", "--url", url, code=1).stderr
