"""What a machine with CUDA imports of ours leaves CUDA's own names alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.engine

PROGRAM = """
import sys, torch
from conserve.engine import door
door.GPUWorker, door.engine_core_module  # what vLLM itself loads there
before = dict(vars(torch.cuda))
import conserve.engine.scheduler, conserve.engine.connector, conserve.engine.plugin
conserve.engine.plugin.register()
import conserve.engine.{worker}
print([name for name in sys.modules if name.startswith("vllm.v1.worker.cpu")])
print([name for name, value in vars(torch.cuda).items() if before.get(name) is not value])
"""


def told(worker: str) -> list[str]:
    """Modules of vLLM's CPU workers, and attributes of torch.cuda that have changed, after all
    of ours and that worker are imported, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(worker=worker)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stdout.splitlines()[-2:]


def test_the_gpus_worker_leaves_cuda_alone() -> None:
    assert told("gpu_worker") == ["[]", "[]"]


def test_the_cpus_worker_does_not() -> None:
    """The negative control: so much would be seen."""
    modules, changed = told("cpu_worker")
    assert "vllm.v1.worker.cpu_worker" in modules
    assert "Event" in changed
    assert "Stream" in changed
