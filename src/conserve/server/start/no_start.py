"""What to say and do when the engine did not start: one sentence for what users can mend."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from conserve.engine.faults import PLACE, first_fault
from conserve.server.errors import StartError

KV_FLAG = {True: "--kv-cache-memory-bytes", False: "--gpu-memory-utilization"}
"""What gives the KV cache more memory, on a CPU and not."""
SMALLER = "serve a smaller or a quantized model"
LARGER = {True: SMALLER, False: f"{SMALLER}, or use more GPUs with --tensor-parallel-size"}

KV_SHORT = re.compile(
    r"max seq len \((\d+)\), \(([\d.]+) GiB KV cache is needed, which is larger than the available "
    r"KV cache memory \(([\d.]+) GiB\)(?:.*maximum model length is (\d+))?",
    re.DOTALL,
)
TAKEN = re.compile(r"\(([\d.]+/[\d.]+ GiB)\) on startup is less than desired (?:GPU|CPU) memory")
NO_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)
KILLED = re.compile(r"[:=] ?-9\b")


@contextmanager
def explained(*, on_cpu: bool) -> Iterator[None]:
    """Around the life of a server. Raises StartError where its engine did not start."""
    with tempfile.TemporaryDirectory(prefix="conserve-start-") as folder:
        place = Path(folder) / "faults"
        os.environ[PLACE] = str(place)
        try:
            yield
        except RuntimeError as error:
            if "initialization failed" not in str(error):
                raise  # of a server that had started
            kind, text = first_fault(place) or (type(error).__name__, str(error))
            raise StartError(sentence(kind, text, on_cpu=on_cpu)) from error
        finally:
            with suppress(KeyError):
                del os.environ[PLACE]


def sentence(kind: str, text: str, *, on_cpu: bool) -> str:
    """What an error of vLLM's or torch's comes to. kind: the name of its class."""
    if found := KV_SHORT.search(text):
        length, needed, there, fits = found.groups()
        shorter = f"at most {fits}" if fits else "a smaller number"
        return (
            f"no memory: one request of {length} tokens takes {needed} GiB of KV cache, and there "
            f"are {there}; give --max-model-len {shorter}, or more memory with {KV_FLAG[on_cpu]}."
        )
    if "No available memory for the cache blocks" in text:
        return (
            "no memory: the weights leave none for the KV cache; give more with "
            f"{KV_FLAG[on_cpu]}, or {LARGER[on_cpu]}."
        )
    if found := TAKEN.search(text):
        return (
            f"no memory: {found[1]} are free, which is less than --gpu-memory-utilization asks "
            "for; end what uses the rest, or give a smaller number."
        )
    if kind in ("OutOfMemoryError", "MemoryError") or NO_MEMORY.search(text):
        return f"no memory: the weights, or a step, do not fit; {LARGER[on_cpu]}."
    if KILLED.search(text):
        return f"a process of the engine was killed, as where memory runs out; {LARGER[on_cpu]}."
    first = " ".join(text.split("\n", 1)[0].split())
    return f"the engine did not start: {first or kind} (above is where)."
