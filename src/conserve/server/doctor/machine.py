"""The machine: processor, memory, what a container's limits leave of them, GPUs."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil

from conserve.server.doctor.finding import Finding
from conserve.server.start.amounts import GIB, gib
from conserve.server.start.cgroup import cpu_limit, memory_limit_bytes

SECTION = "machine"
NEEDED_BYTES = 4 * GIB
"""Of memory, for the default model and two processes of vLLM."""
MATTER = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "sve",
)
"""Instructions that decide the data type and the kernels, as the kernel names them."""
GPU_FIELDS = "name,driver_version,memory.total,memory.used,compute_cap"
GPU_LIMIT_S = 20


def machine(root: Path = Path("/")) -> Iterator[Finding]:
    yield Finding(SECTION, "processor", _processor(root))
    yield Finding(SECTION, "instructions", ", ".join(_instructions(root)) or "none that matter")
    yield _cpus(root)
    yield _memory(root)
    yield from _gpus()


def _cpuinfo(root: Path, *names: str) -> str:
    """The first value of any of these names."""
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() in names), "")


def _processor(root: Path) -> str:
    return _cpuinfo(root, "model name", "Processor", "CPU part") or platform.processor() or "?"


def _instructions(root: Path) -> list[str]:
    has = _cpuinfo(root, "flags", "Features").split()
    return [name for name in MATTER if name in has]


def _cpus(root: Path) -> Finding:
    allowed = len(os.sched_getaffinity(0))
    limit = cpu_limit(root)
    text = f"{allowed} usable of {os.cpu_count()}"
    if limit is None or limit >= allowed:
        return Finding(SECTION, "CPUs", text)
    text += f", and a control group allows the time of {limit:g}"
    if limit >= 1:
        return Finding(SECTION, "CPUs", text)
    fix = "Raise the container's limit of CPUs to 2 at least."
    return Finding.warning(SECTION, "CPUs", text, fix)


def _memory(root: Path) -> Finding:
    whole, limit = psutil.virtual_memory(), memory_limit_bytes(root)
    text = f"{gib(whole.available)} free of {gib(whole.total)}"
    free = whole.available
    if limit is not None and limit < whole.total:
        text += f", and a control group allows {gib(limit)}"
        free = min(free, limit)
    if free >= NEEDED_BYTES:
        return Finding.ok(SECTION, "memory", text)
    fix = f"The default model needs {gib(NEEDED_BYTES)}: free some, or raise the container's limit."
    return Finding.warning(SECTION, "memory", text, fix)


def _gpus() -> Iterator[Finding]:
    program = shutil.which("nvidia-smi")
    if program is None:
        yield Finding(SECTION, "GPUs", "none (no nvidia-smi here)")
        return
    command = [program, f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=GPU_LIMIT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        done = subprocess.CompletedProcess(command, 1, "", str(error))
    if done.returncode:
        fix = "Repair the driver, or lend the container the GPU, until nvidia-smi lists it."
        told = " ".join((done.stderr or done.stdout).split())
        yield Finding.problem(SECTION, "GPUs", f"nvidia-smi fails: {told}", fix)
        return
    for number, line in enumerate(done.stdout.splitlines()):
        words = ("", "driver ", "", "used ", "compute capability ")
        fields = zip(words, line.split(","), strict=False)
        told = ", ".join(word + field.strip() for word, field in fields)
        yield Finding.ok(SECTION, f"GPU {number}", told)
