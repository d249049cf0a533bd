"""P1 and P4 with vLLM's real model runners, both step loops, and stops at random layers.

Model Runner V2 is made of Triton kernels, interpreted here: put the `triton` package on the path
(it is not among the requirements) for its cases.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.engine, pytest.mark.long]

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu" / "same_output.py"
RUNNERS = ["v1", pytest.param("v2", marks=pytest.mark.skipif(not find_spec("triton"), reason="V2"))]


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    out = folder / "out.json"
    command = [sys.executable, str(PROGRAM), *arguments, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("scheduling", ["sync", "async"])
@pytest.mark.parametrize("runner", RUNNERS)
def test_stops_change_no_token(tmp_path: Path, runner: str, scheduling: str) -> None:
    found = run(tmp_path, "--runner", runner, "--scheduling", scheduling)
    assert found["runner"] == runner
    assert found["async_scheduling"] is (scheduling == "async")
    assert found["can_stop"]
    assert found["num_stops"] > 50
    assert found["stopped_at_layers"] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert found["equal_without_stops"] == found["equal_with_stops"] == found["requests"]


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_stop_that_leaves_a_trace_in_the_runner_is_seen(tmp_path: Path, runner: str) -> None:
    """The negative control."""
    found = run(tmp_path, "--runner", runner, "--careless")
    assert found["num_stops"] > 0
    assert found["equal_without_stops"] == found["requests"]
    assert found["equal_with_stops"] < found["requests"]
