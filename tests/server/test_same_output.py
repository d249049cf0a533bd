"""P4 on the real model: greedy answers do not depend on who else is served."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import openai
import pytest

pytestmark = pytest.mark.server

NUM_OFFLINE = 6
SCARCE_BYTES = 120 << 20
"""KV of three of the documents, in float32."""
CHATS = ["What is a list?", "Name three colours.", "How do I open a file?", "Say hello."]


def summarise(client: openai.OpenAI, text: str, salt: str) -> str:
    """A greedy offline answer; `salt` keeps one run from reading the other's prefix cache."""
    answer = client.completions.create(
        model=client.models.list().data[0].id,
        prompt=f"{text}\n\nIn short:",
        max_tokens=24,
        temperature=0,
        extra_body={"service_tier": "flex", "cache_salt": salt},
    )
    return answer.choices[0].text


def chat(client: openai.OpenAI, text: str) -> str:
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": text}],
        max_tokens=12,
        temperature=0,
    )
    return answer.choices[0].message.content or ""


def test_offline_answers_are_those_given_alone(start_server: Any, tmp_path: Path) -> None:
    """Exact in float32, with eager stops and a KV cache too small for all: displaced requests
    come back from their checkpoints."""
    documents = [text[:3000] for _, text in sorted(topics.items()) if len(text) > 3000]
    documents = documents[:NUM_OFFLINE]
    settings = {"conserve": {"stop": "eager", "profile_seconds": 3}}
    arguments = (
        *("--dtype", "float32", "--additional-config", json.dumps(settings)),
        *("--profile-dir", str(tmp_path)),
        *("--kv-cache-memory-bytes", str(SCARCE_BYTES), "--max-model-len", "2048"),
    )
    with start_server(*arguments, "--max-num-seqs", "3") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        alone = [summarise(client, text, "alone") for text in documents]
        chats_alone = [chat(client, text) for text in CHATS]
        with ThreadPoolExecutor(NUM_OFFLINE + len(CHATS)) as pool:
            offline = [pool.submit(summarise, client, text, "busy") for text in documents]
            for _ in range(4):
                answers = list(pool.map(lambda text: chat(client, text), CHATS))
                assert answers == chats_alone
            together = [future.result() for future in offline]
        assert together == alone
        assert all(alone)
        assert server.metric("conserve:ttft_seconds_count", **{"class": "offline"}) == (
            2 * NUM_OFFLINE
        )
        assert server.metric("conserve:displaced_requests_total") > 0
        assert server.metric("conserve:restored_tokens_total", source="memory") > 0
