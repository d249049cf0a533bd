"""vLLM, ConServe and what both need, as a few parts for a GPU machine without a network.

    python benchmarks/gpu/pack.py out/kit
    # copy out/kit there, at once or a part at a time; then on that machine
    python3 benchmarks/gpu/unpack.py out/kit /tmp/site && . /tmp/site/env.sh

Fetches the wheels of vllm.lock and ours.lock (lock.py writes them) with pip. What `machine.txt`
names is on the other machine, and stays out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import sent
from lock import OUR_LOCK, PYTHON, ROOT, VLLM_LOCK, pins
from packaging.utils import parse_wheel_filename
from packaging.version import Version
from parts import unpack_wheel, write_parts

LATEST_GLIBC = 35


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--locks", type=Path, nargs="+", default=[VLLM_LOCK, OUR_LOCK])
    parser.add_argument("--wheels", type=Path, help="a folder that keeps them for the next time")
    parser.add_argument("--python", default=PYTHON, help="of the other machine")
    parser.add_argument("--part-mib", type=float, default=44.0, help="of one part, at most")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        kept, site = options.wheels or Path(scratch, "wheels"), Path(scratch, "site")
        wheels = [*fetched(options.locks, kept, options.python), build_ours(Path(scratch, "ours"))]
        for wheel in wheels:
            unpack_wheel(wheel, site)
        parts = write_parts(site, options.folder, int(options.part_mib * 2**20))
    sizes = ", ".join(f"{part.stat().st_size / 2**20:.1f}" for part in parts)
    print(f"{len(wheels)} wheels; parts of {sizes} MiB")
    print(sent.told(sent.folder_sizes(ROOT), options.folder, sent.LIMIT_MIB)[0])


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


def fetched(locks: list[Path], folder: Path, python: str) -> list[Path]:
    """The wheel of each package that the locks name, from `folder` or from an index."""
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    target += [f"--platform=manylinux_2_{minor}_x86_64" for minor in range(5, LATEST_GLIBC + 1)]
    target += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    requirements = [f"--requirement={lock}" for lock in locks]
    pip("download", "--no-deps", *target, "--dest", str(folder), *requirements)
    wanted = {(name, Version(v)) for lock in locks for name, v in pins(lock).items()}
    wheels = sorted(folder.glob("*.whl"))
    return [wheel for wheel in wheels if parse_wheel_filename(wheel.name)[:2] in wanted]


def build_ours(folder: Path) -> Path:
    pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    (wheel,) = folder.glob("*.whl")
    return wheel


if __name__ == "__main__":
    main()
