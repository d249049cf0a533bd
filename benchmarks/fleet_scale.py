"""What a queue hands out and stores, and what that costs its database.

    python benchmarks/fleet_scale.py [--quick] [--only hand_out,idle]
    python benchmarks/sim_fleet.py --queue-only    # a thousand replicas of it, and docs/fleet.md

Starts a PostgreSQL server of its own (durable: fsync on), and replicas of our batch service over an
engine of known speed, a process each. Writes benchmarks/results/fleet-scale.json, where parts that
are not asked for stay as they are:

- hand_out: engines that answer at once, so that the queue is all there is to wait for
- engines: engines of known speed; what of it the queue gets out of them
- idle: replicas that have nothing to do
- takeover: kill -9 of one of several, on machines of their own and on one
- rows: the same calls beside few and many stored lines, and what a line weighs

Wall times are the machine's at that moment; counts, bytes and processor times hold on a busy one,
too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from fleet.bench import Bench
from fleet.hand_out import engines, hand_out
from fleet.idle import idle
from fleet.rows import rows
from fleet.takeover import takeover

from conserve.bench.machine import describe_machine

OUT = Path(__file__).parent / "results" / "fleet-scale.json"
PARTS = {part.__name__: part for part in (hand_out, engines, idle, takeover, rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer lines and fewer kills")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args()
    found = json.loads(chosen.out.read_text()) if chosen.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), quick=chosen.quick)
        try:
            for name in chosen.only.split(","):
                found[name] = []
                for row in PARTS[name](bench):
                    found[name].append(said(name, row))
                    write(chosen.out, found | {"machine": describe_machine()})
        finally:
            bench.close()


def said(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row, once its figures are on the terminal."""
    short = {key: value for key, value in row.items() if key not in ("costliest", "waits")}
    print(name, json.dumps(rounded(short)), flush=True)
    return row


def write(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(found), indent=1) + "\n")


def rounded(value: Any) -> Any:
    """To four digits, all the way down."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
