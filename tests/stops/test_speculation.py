"""Speculative decoding on a real engine: a prompt that the prefix cache holds but for one token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.stops.conftest import ROOT
from tests.stops.same_prompt import BLOCK_SIZE

pytestmark = [pytest.mark.engine, pytest.mark.long]


def test_the_same_prompt_again_is_answered_alike(tiny_model: Path) -> None:
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.stops.same_prompt", str(tiny_model)],
        cwd=ROOT,
        env={**os.environ, **environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert [cached for cached, _ in answers] == [0, BLOCK_SIZE, BLOCK_SIZE]
    assert len({tuple(tokens) for _, tokens in answers}) == 1
