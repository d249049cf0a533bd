"""Real engines in a process of their own: families of models play, and write what came of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.models.registry import FAMILIES

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # The models are too small for more than a thread.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
}
LONGEST_S = 600.0
Results = dict[str, dict[str, Any]]


def run_engine(
    module: str, *arguments: str, longest_s: float = LONGEST_S
) -> subprocess.CompletedProcess[str]:
    """Run one of the programs of this folder to its end, however it ends."""
    return subprocess.run(
        [sys.executable, "-m", f"tests.models.{module}", *arguments],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=longest_s,
        check=False,
    )


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The end of all that it printed."""
    return done.stdout[-4000:] + done.stderr[-4000:]


def play(names: Iterable[str], folder: Path, *, careless: bool = False) -> Results:
    """Play these families in one process, which imports vLLM once; what came of each."""
    models = {name: str(FAMILIES[name].make(folder / name)) for name in names}
    result = folder / "result"
    done = run_engine("play", json.dumps(models), str(result), *(["careless"] if careless else []))
    assert done.returncode == 0, said(done)
    found: Results = json.loads(result.read_text())
    return found
