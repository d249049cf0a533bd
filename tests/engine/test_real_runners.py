"""P1 and P4 with vLLM's real model runners, both step loops, and stops at random layers, beside
chunked prompts, prefix hits and displacement.

Model Runner V2 is made of Triton kernels, which run in Triton's interpreter here. `make soak` puts
Triton into a folder of its own: vLLM and torch ask whether it is installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.engine, pytest.mark.long]

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu" / "same_output.py"
INTERPRETER = Path(sys.prefix) / "interpreter"
HAS_TRITON = (INTERPRETER / "triton").is_dir() or find_spec("triton") is not None
NO_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="no Triton: `make soak` fetches it")
RUNNERS = ["v1", pytest.param("v2", marks=NO_TRITON)]


def call(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), *arguments, "--out", str(out)]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(INTERPRETER)]))
    return subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    out = folder / "out.json"
    done = call(out, *arguments)
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
    assert found["displaced_requests"] > 0
    assert found["equal_without_stops"] == found["equal_with_stops"] == found["requests"]


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_stop_unwinds_a_forward_that_is_compiled_in_pieces(tmp_path: Path, runner: str) -> None:
    """As on a GPU: each of the eight layers' attention lies between two pieces."""
    scheduling = "async" if runner == "v2" else "sync"
    arguments = ["--runner", runner, "--scheduling", scheduling, "--compiled", "--rounds", "1"]
    found = run(tmp_path, *arguments)
    assert found["compiled_pieces"] == 8 + 9
    assert found["num_stops"] > 20
    assert found["stopped_at_layers"] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert found["equal_without_stops"] == found["equal_with_stops"] == found["requests"]


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_stop_that_leaves_a_trace_in_the_runner_is_seen(tmp_path: Path, runner: str) -> None:
    """The negative control: wrong text, or V2 samples a token that vLLM's scheduler, by an
    assertion of its own, does not expect."""
    out = tmp_path / "out.json"
    done = call(out, "--runner", runner, "--careless")
    assert done.returncode == 1
    if not out.is_file():
        assert runner == "v2"
        assert "assert request.num_output_placeholders >= 0" in done.stderr
        return
    found = json.loads(out.read_text())
    assert "texts differ" in found["wrong"]
    assert found["num_stops"] > 0
    assert found["equal_without_stops"] == found["requests"]
    assert found["equal_with_stops"] < found["requests"]
