"""Batches: sent with a deadline and followed to their end; and who is told of it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from conserve.bench.ports import free_port
from tests.conftest import Server
from tests.examples.conftest import EXAMPLES, RunExample, counted, environment
from tests.waiting import eventually

pytestmark = pytest.mark.server

SECRET = "whsec_" + "c2VjcmV0" * 5


def test_a_batch_with_a_deadline(server: Server, example: RunExample) -> None:
    with counted(server, online=0, offline=5):
        told = example("batch_with_deadline.py")
    assert re.search(r"^batch_\w+: completed, deadline met$", told, re.MULTILINE)
    moods = re.findall(r"^(good|bad|mixed) +(.+)$", told, re.MULTILINE)
    assert [review for _, review in moods] == [
        "I love it.",
        "Broken on arrival.",
        "Good sound, poor battery.",
        "Never again.",
        "Nice!",
    ]


@contextmanager
def receiving(server: Server, told: Path, port: int) -> Iterator[None]:
    """The receiver listens for the length of a `with`; what it says goes into `told`."""
    with told.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / "webhook_receiver.py")],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(server, WEBHOOK_SECRET=SECRET, WEBHOOK_PORT=str(port)),
        )
        try:
            eventually(lambda: listens(port) or process.poll() is not None)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def listens(port: int) -> bool:
    try:
        httpx.get(f"http://127.0.0.1:{port}")
    except httpx.TransportError:
        return False
    return True


def send_batch(server: Server) -> str:
    """Of one line."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        model = client.models.list().data[0].id
        body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        url = "/v1/chat/completions"
        line = {"custom_id": "greeting", "method": "POST", "url": url, "body": body}
        file = client.files.create(file=("a.jsonl", json.dumps(line).encode()), purpose="batch")
        return client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        ).id


def test_a_receiver_of_ends(server: Server, owner_limits: Path, tmp_path: Path) -> None:
    port, told = free_port(), tmp_path / "told"
    webhook = {"url": f"http://127.0.0.1:{port}", "secret": SECRET, "allow_private": True}
    with receiving(server, told, port):
        owner_limits.write_text(json.dumps({"default": {"webhook": webhook}}))
        try:
            batch_id = send_batch(server)
            eventually(lambda: "greeting: " in told.read_text())
        finally:
            owner_limits.write_text("{}")
        forged: Any = {"type": "batch.completed", "id": "evt_1", "data": {"id": "batch_forged"}}
        signed = {"webhook-id": "evt_1", "webhook-timestamp": str(int(time.time()))}
        signed["webhook-signature"] = "v1,bm8="
        reply = httpx.post(f"http://127.0.0.1:{port}", json=forged, headers=signed)
        assert reply.status_code == 400
    lines = told.read_text().splitlines()
    assert f"batch.completed: {batch_id}" in lines
    assert "batch_forged" not in told.read_text()
