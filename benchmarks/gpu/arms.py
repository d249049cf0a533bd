"""Arms on one load, from the records of which report.py makes its tables.

    python benchmarks/gpu/arms.py SCENARIO --model FOLDER --arms online-only,fcfs --out DIR

Arms whose servers are started alike take turns on one. No report is drawn: that can wait.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from sizes import server_arguments

from conserve.bench.arms import arm_named
from conserve.bench.plan import Plan
from conserve.bench.runner import Runner
from conserve.bench.selection import chosen
from conserve.server.start.dtype import multiplies_bfloat16_here

POOL = "--checkpoint-bytes=8GiB"
"""Of ours. A pool of the default size takes tens of seconds to pin: into the load."""


def server_flags(arms: str, *, tiny: bool) -> tuple[str, ...]:
    """What the servers of these arms get. Exits where some are ours and some are not."""
    kinds = {arm_named(name).kind for name in arms.split(",")}
    if len(kinds) > 1:
        sys.exit(f"--arms {arms}: name those of stock vLLM in a command of their own")
    ours = kinds == {"conserve"} and not tiny
    return (*server_arguments(tiny=tiny), *([POOL] if ours else []))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--arms", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    plan = Plan(
        scenario=chosen(options.scenario, options.arms, None),
        model=options.model,
        folder=options.out,
        command=f"python benchmarks/gpu/arms.py {options.scenario.name} --arms {options.arms}",
        server_args=server_flags(options.arms, tiny=options.tiny),
        cpu_dtype="bfloat16" if multiplies_bfloat16_here() else "float32",
        share_servers=True,
    )
    # A run that is ended must end its server too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("over time"))
    return 1 if Runner(plan, lambda text: print(text, flush=True)).run() else 0


if __name__ == "__main__":
    sys.exit(main())
