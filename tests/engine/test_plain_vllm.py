"""The scheduler without `conserve serve`: as vLLM's users may name it themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.engine, pytest.mark.server]

SCRIPT = """
import sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(
        model=sys.argv[1],
        scheduler_cls="conserve.engine.scheduler.ConserveScheduler",
        scheduling_policy="priority",
        additional_config={"conserve": {"profile_seconds": 0}},
        enforce_eager=True,
        max_model_len=1024,
        kv_cache_memory_bytes=1 << 28,
    )
    prompts = ["The capital of France is", "One, two, three,", "Water boils at"]
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    answers = llm.generate(prompts, params, priority=[0, 1, 1])
    for answer in answers:
        print("ANSWER", len(answer.outputs[0].token_ids))
"""


def test_llm_takes_our_scheduler(tmp_path: Path) -> None:
    from conserve.server.start.default_model import default_model

    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(default_model())],
        capture_output=True,
        text=True,
        env=environment,
        timeout=500,
    )
    assert done.stdout.count("ANSWER 8") == 3, done.stdout[-3000:] + done.stderr[-3000:]
    assert "stops: off: no ConserveConnector" in done.stdout + done.stderr
