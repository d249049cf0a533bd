"""LiteLLM in front: which words of a caller's reach the server, and which do not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from conserve.bench.ports import free_port
from tests.conftest import Server
from tests.examples.conftest import EXAMPLES, RunExample, counted, environment
from tests.waiting import LIMIT_S, eventually

pytestmark = pytest.mark.server

PROXY = os.environ.get("LITELLM_PROXY")
CONFIG = EXAMPLES / "litellm_proxy.yaml"


def test_the_router(server: Server, example: RunExample) -> None:
    with counted(server, online=1, offline=4):
        told = example("litellm_router.py")
    assert len(re.findall(r"^bulk \(flex\): ", told, re.MULTILINE)) == 4
    assert len(re.findall(r"^chat \(default\): ", told, re.MULTILINE)) == 1


CARELESS_CALLER = """
import asyncio, litellm_router as example
model = example.OpenAI(base_url=example.URL, api_key=example.KEY).models.list().data[0].id
asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
router = example.make_router(model)
print(asyncio.run(router.acompletion(model="chat", priority=5, **asked)).service_tier)
print(asyncio.run(router.acompletion(model="chat", service_tier="flex", **asked)).service_tier)
"""


def test_a_callers_priority_is_dropped_and_its_tier_is_not(server: Server) -> None:
    with counted(server, online=1, offline=1):
        done = subprocess.run(
            [sys.executable, "-c", CARELESS_CALLER],
            env=environment(server, PYTHONPATH=str(EXAMPLES)),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
    assert done.stdout == "default\nflex\n", done.stderr[-4000:]


def test_the_proxys_file_names_what_the_router_does() -> None:
    models = yaml.safe_load(CONFIG.read_text())["model_list"]
    asked = {each["model_name"]: each["litellm_params"] for each in models}
    assert asked["bulk"]["service_tier"] == "flex"
    assert "service_tier" not in asked["chat"]


@contextmanager
def proxy(server: Server, log: Path) -> Iterator[openai.OpenAI]:
    port = free_port()
    place = ["--config", str(CONFIG), "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(PROXY), *place],
            env=environment(server, CONSERVE_API_BASE=f"{server.url}/v1", OPENAI_API_KEY="none"),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            eventually(lambda: b"Uvicorn running" in log.read_bytes() or process.poll() is not None)
            assert process.poll() is None, log.read_text()[-4000:]
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
                yield client
        finally:
            process.terminate()
            process.wait()


@pytest.mark.skipif(
    not PROXY, reason="LITELLM_PROXY names no `litellm`; it needs an environment of its own (mcp 1)"
)
def test_the_proxy(server: Server, tmp_path: Path) -> None:
    def tier(client: openai.OpenAI, model: str, **more: Any) -> str | None:
        asked: Any = {"model": model, "messages": [{"role": "user", "content": "Hi"}], **more}
        told: str | None = client.chat.completions.create(max_tokens=4, **asked).service_tier
        return told

    with proxy(server, tmp_path / "log") as client, counted(server, online=2, offline=3):
        assert tier(client, "chat") == "default"
        assert tier(client, "bulk") == "flex"
        assert tier(client, "chat", service_tier="flex") == "flex"
        assert tier(client, "chat", extra_headers={"x-vllm-priority": "4"}) == "flex"
        assert tier(client, "chat", extra_body={"priority": 5}) == "default"
