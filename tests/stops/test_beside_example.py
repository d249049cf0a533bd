"""A KV connector of the user's beside ours, end to end: vLLM's ExampleConnector, which keeps
the KV of prompts in files, layer by layer."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.stops.tiny_server import ask, documents, flags, harvesting

pytestmark = pytest.mark.server

NUM_DOCUMENTS = 3
NUM_ROUNDS = 5
MOST_ROUNDS = 60


def num_stops(server: Any) -> float:
    return float(server.metric("conserve:stopped_steps_total"))


def test_what_it_stored_amid_stops_is_what_it_loads(
    start_server: Any, tiny_model: Path, tmp_path: Path
) -> None:
    """Chats come again and again while documents are worked on: their KV is stored at first and
    loaded from then on. ExampleConnector cannot store a prompt that comes in chunks, so its
    store is emptied before the documents come a second time.
    """
    store = tmp_path / "store"
    config = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(store)},
    }
    chats, texts = documents(1, 4, length=120), documents(2, NUM_DOCUMENTS)
    arguments = flags(
        tiny_model,
        tmp_path,
        "--kv-transfer-config",
        json.dumps(config),
        "--no-enable-prefix-caching",
    )
    with start_server(*arguments) as server, ThreadPoolExecutor(NUM_DOCUMENTS) as pool:
        with harvesting(server, num_clients=2):
            futures = [pool.submit(ask, server, t, tier="flex", max_tokens=24) for t in texts]
            answers: list[list[str]] = []
            while len(answers) < NUM_ROUNDS or num_stops(server) <= 3:
                assert len(answers) < MOST_ROUNDS, "hardly a step is stopped"
                answers.append([ask(server, chat) for chat in chats])
            together = [future.result() for future in futures]
        assert num_stops(server) > 3
        assert "External Cache Hit!" in server.log.read_text()
        shutil.rmtree(store)
        store.mkdir()
        assert [ask(server, t, tier="flex", max_tokens=24) for t in texts] == together
        alone = [ask(server, chat) for chat in chats]
        assert answers == [alone] * len(answers)
        assert len(set(alone)) == len(alone)
        assert server.metric("conserve:output_tokens_total", **{"class": "online"}) > 0
        assert "Traceback" not in server.log.read_text()
