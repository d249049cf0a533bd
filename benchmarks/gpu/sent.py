"""What each call of the plan sends: the repository's files, and a part of the kit beside them.

    python benchmarks/gpu/sent.py out/kit

Says whether that fits, and which folders are the largest. The exit status is 1 if it does not fit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_MIB = 64.0
NUM_FOLDERS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kit", type=Path)
    parser.add_argument("--limit-mib", type=float, default=LIMIT_MIB, help="of one call")
    options = parser.parse_args()
    line, fits = told(folder_sizes(ROOT), options.kit, options.limit_mib)
    print(line)
    return 0 if fits else 1


def folder_sizes(root: Path) -> Counter[str]:
    """Bytes of the files that Git does not ignore and that are there, by folder, two deep."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    sizes: Counter[str] = Counter()
    for name in set(filter(None, listed.split("\0"))):
        file = root / name
        if file.is_file():
            sizes["/".join(Path(name).parts[:-1][:2]) or "."] += file.stat().st_size
    return sizes


def told(sizes: Counter[str], kit: Path, limit_mib: float) -> tuple[str, bool]:
    """One line on the largest call, and whether it fits."""
    tree, part = sizes.total(), max(file.stat().st_size for file in kit.glob("part-*"))
    fits = tree + part <= limit_mib * 2**20
    sum_of = f"{_mib(tree)} of files and a part of {_mib(part)} are {_mib(tree + part)}"
    largest = ", ".join(f"{name} {_mib(size)}" for name, size in sizes.most_common(NUM_FOLDERS))
    if fits:
        return f"{sum_of}: each call fits into {limit_mib:g} MiB", True
    return f"{sum_of}, more than {limit_mib:g} MiB; the largest folders: {largest}", False


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
