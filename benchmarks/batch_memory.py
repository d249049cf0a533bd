"""Memory of a batch server while it takes in and validates the largest file it accepts.

    python benchmarks/batch_memory.py [--mib 199] [--lines 50000]

Starts the test server (our routes over a fake model), uploads a file of that size, creates a batch
whose last line is bad, so that the whole file is validated and no line runs, and prints the
resident set of the server at idle and its peak above that (VmHWM, reset at idle), in MiB, with the
seconds the upload and the validation took.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from tests.batch.batch_server import Server, server
from tests.batch.builders import CHAT, line, numbered

MIB = 1024 * 1024


def memory_mib(pid: int, field: str) -> float:
    for text in Path(f"/proc/{pid}/status").read_text().splitlines():
        if text.startswith(field):
            return int(text.split()[1]) / 1024
    raise KeyError(field)


def reset_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def big_file(path: Path, num_bytes: int, num_lines: int) -> None:
    filler = "x" * (num_bytes // num_lines - 200)
    with path.open("wb") as handle:
        for number in range(num_lines - 1):
            row = line(f"request-{number}", f"{number} {filler}")
            handle.write(json.dumps(row).encode() + b"\n")
        handle.write(json.dumps(line("bad", body={"stream": True})).encode() + b"\n")


def run_batch(one: Server, path: Path, wanted: str) -> dict[str, float]:
    """Seconds of the upload, and from creation to `wanted`."""
    with one.client as client:
        started = time.monotonic()
        file = client.files.create(file=path, purpose="batch")
        uploaded = time.monotonic()
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        while (batch := client.batches.retrieve(batch.id)).status != wanted:
            time.sleep(0.1)
        return {
            "upload_s": round(uploaded - started, 2),
            "validation_s": round(time.monotonic() - uploaded, 2),
            "errors": len(batch.errors.data or ()) if batch.errors else 0,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=199)
    parser.add_argument("--lines", type=int, default=50_000)
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="conserve-memory-") as folder:
        path = Path(folder) / "big.jsonl"
        big_file(path, words.mib * MIB, words.lines)
        small = Path(folder) / "small.jsonl"
        small.write_bytes(numbered(10))
        with server(Path(folder) / "data") as one:
            assert one.wait()
            run_batch(one, small, "completed")  # what any first batch loads is not this one's
            pid = one.process.pid
            idle_mib = memory_mib(pid, "VmRSS")
            reset_peak(pid)
            found = run_batch(one, path, "failed")
            peak_mib = memory_mib(pid, "VmHWM")
    report = {
        "file_mib": words.mib,
        "lines": words.lines,
        "idle_mib": round(idle_mib, 1),
        "peak_above_idle_mib": round(peak_mib - idle_mib, 1),
        **found,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
