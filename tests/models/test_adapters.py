"""LoRA adapters on a real engine that has room for one in a step: chats do not wait behind offline
work of another, and every answer is the one given alone."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.models.adapters_engine import NUM_TOKENS, OFFLINE, ONLINE
from tests.models.playing import run_engine, said
from tests.stops.tiny_llama import make_lora, make_model

pytestmark = pytest.mark.engine


def played(folder: Path, *careless: str) -> Any:
    """What came of it, or what the engine said as it died."""
    model = make_model(folder / "model")
    adapters = [str(make_lora(folder / f"adapter-{seed}", seed)) for seed in (1, 2)]
    result = folder / "result"
    done = run_engine(
        "adapters_engine", str(model), *adapters, str(result), *careless, longest_s=400
    )
    if done.returncode:
        return said(done)
    return json.loads(result.read_text())


def test_chats_of_one_adapter_come_before_offline_work_of_another(tmp_path: Path) -> None:
    told = played(tmp_path)
    assert isinstance(told, dict), told
    for name in (*OFFLINE, *ONLINE):
        alone, together = (told["tokens"][f"{name}/{how}"] for how in ("alone", "together"))
        assert together == alone, name
        assert len(alone) == NUM_TOKENS["online" if name in ONLINE else "offline"]
    assert told["num_stops"], "else it shows less than it says"
    assert told["leaked_blocks"] == 0
    assert {len(adapters) for adapters in told["steps"]} == {1}
    waited = {name: told["waited"][f"{name}/together"] for name in ONLINE}
    # Its prompt, and what was in flight when it came.
    assert max(waited.values()) <= 4, waited
    turns = [adapter for adapter, _ in groupby(told["steps"])]
    # Offline work, and each chat of the other adapter: there and back.
    assert len(turns) <= 2 + 2 * len(ONLINE), "adapters take turns from step to step"


@pytest.mark.matrix
def test_an_engine_that_looks_at_no_adapter_lets_chats_wait_or_dies(tmp_path: Path) -> None:
    """The negative control: vLLM passes over whom it has no adapter for, and counts the adapters
    of a step itself."""
    told = played(tmp_path, "careless")
    if isinstance(told, dict):
        assert told["waited"][f"{ONLINE[0]}/together"] > NUM_TOKENS["offline"] / 2
    else:
        assert "assert len(scheduled_loras) <= self.lora_config.max_loras" in told
