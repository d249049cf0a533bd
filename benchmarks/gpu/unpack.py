"""The parts that pack.py wrote, into a folder of packages; then whether all of it can be imported.

    python3 benchmarks/gpu/unpack.py out/kit /tmp/site && . /tmp/site/env.sh

Runs on the other machine with nothing but its Python. The last line of the check says whether a
kernel of vLLM's gives what PyTorch gives on the GPU; what cannot be imported is named.
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # flashinfer is not packed, and vLLM's sampler would import it.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", type=Path)
    parser.add_argument("site", type=Path)
    options = parser.parse_args()
    started = time.monotonic()
    parts = checked(options.parts)
    extract(parts, options.site)
    # Compiled by all cores at once; the first import would do it by one.
    compileall.compile_dir(options.site, quiet=2, workers=0)
    variables = ENVIRONMENT | {"PYTHONPATH": str(options.site.resolve())}
    lines = [f"export {name}={value}\n" for name, value in variables.items()]
    (options.site / "env.sh").write_text("".join(lines))
    print(f"{len(parts)} parts unpacked in {time.monotonic() - started:.1f} s", flush=True)
    check = Path(__file__).with_name("check.py")
    return subprocess.run([sys.executable, check], env=os.environ | variables).returncode


def checked(folder: Path) -> list[Path]:
    """The parts in their order. Exits where one is missing or broken."""
    parts = []
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        part = folder / name
        if not part.is_file() or hashlib.sha256(part.read_bytes()).hexdigest() != digest:
            sys.exit(f"{part}: missing or broken; copy it again")
        parts.append(part)
    return parts


def extract(parts: list[Path], site: Path) -> None:
    with tarfile.open(fileobj=io.BufferedReader(Joined(parts), 1 << 20), mode="r|xz") as tar:
        tar.extractall(site, filter="data")


class Joined(io.RawIOBase):
    """The bytes of several files, one after another."""

    def __init__(self, files: list[Path]) -> None:
        self._pieces = self._read(files)
        self._rest = b""

    @staticmethod
    def _read(files: list[Path]) -> Iterator[bytes]:
        for file in files:
            with file.open("rb") as source:
                while piece := source.read(1 << 20):
                    yield piece

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._rest = self._rest or next(self._pieces, b"")
        taken, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)


if __name__ == "__main__":
    sys.exit(main())
