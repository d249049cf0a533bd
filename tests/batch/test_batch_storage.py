"""A server in a process of its own whose disk fills up, and uploads that break off on the way."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest

from tests.batch.batch_fakes import answer
from tests.batch.batch_server import PATIENCE_S, Server, counts, output_lines, server
from tests.batch.builders import batch_body, numbered, submit

NUM_LINES = 1500


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Server]:
    with server(tmp_path) as one:
        assert one.wait()
        yield one


def eventually(true: Callable[[], bool]) -> None:
    patience = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < patience
        time.sleep(0.02)


def limit_files(one: Server, num_bytes: int) -> None:
    """No file of the server may grow beyond this: what it meets then is what a full disk is."""
    hard = resource.prlimit(one.process.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(one.process.pid, resource.RLIMIT_FSIZE, (num_bytes, hard))


def test_a_full_disk_costs_no_line(one: Server, tmp_path: Path) -> None:
    prompts = {f"request-{n}": f"prompt {n}" for n in range(NUM_LINES)}
    with one.client as client:
        batch_id = submit(client, numbered(NUM_LINES))
        eventually(lambda: client.batches.retrieve(batch_id).status != "validating")
        again = batch_body(client.batches.retrieve(batch_id).input_file_id)
        limit_files(one, 1024)
        with pytest.raises(openai.InternalServerError) as caught:
            client.files.create(file=("in.jsonl", numbered(400)), purpose="batch")
        assert (caught.value.status_code, caught.value.code) == (503, "storage_full")
        with pytest.raises(openai.InternalServerError) as caught:
            client.batches.create(**again)
        assert (caught.value.status_code, caught.value.code) == (503, "store_unavailable")
        stuck = client.batches.retrieve(batch_id)
        assert stuck.status in ("in_progress", "finalizing", "completed")
        limit_files(one, resource.RLIM_INFINITY)
        eventually(lambda: client.batches.retrieve(batch_id).status == "completed")
        batch = client.batches.retrieve(batch_id)
        lines = output_lines(client, batch)
        found = {each["custom_id"]: each["response"]["body"] for each in lines}
        assert len(lines) == len(found) == counts(batch)[1] == NUM_LINES
        assert found == {custom_id: answer(prompt) for custom_id, prompt in prompts.items()}
        assert len(client.files.list().data) == len(os.listdir(tmp_path / "files")) == 2
    assert os.listdir(tmp_path / "staging") == []


def test_an_upload_that_breaks_off_leaves_nothing(one: Server, tmp_path: Path) -> None:
    """On a real socket: closed, and reset, in the middle of the file."""
    with one.client as client:
        assert client.files.list().data == []  # the first request makes the folders
        address = urlsplit(str(client.base_url))
    for linger in (None, b"\1\0\0\0\0\0\0\0"):
        with socket.create_connection((address.hostname, address.port)) as line:
            if linger is not None:
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            line.sendall(
                b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
                b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
                b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhalf'
            )
            eventually(lambda: os.listdir(tmp_path / "staging") != [])
        eventually(lambda: os.listdir(tmp_path / "staging") == [])
    with one.client as client:
        assert client.files.list().data == []
    assert os.listdir(tmp_path / "files") == []
