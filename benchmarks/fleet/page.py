"""The tables of docs/fleet.md, from the results that are kept."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "fleet.md"
RESULTS = ROOT / "benchmarks" / "results"


def write_page() -> None:
    """Put both tables in their places, and leave the rest of the page as it is."""
    measured = json.loads((RESULTS / "fleet-scale.json").read_text())
    reckoned = json.loads((RESULTS / "sim-fleet.json").read_text())["queues"]
    text = PAGE.read_text()
    for name, rows in (("measured", _measured(measured)), ("reckoned", _reckoned(reckoned))):
        begin, end = f"<!-- fleet:{name} -->\n", f"<!-- /fleet:{name} -->"
        before, _, rest = text.partition(begin)
        text = before + begin + "\n".join(rows) + "\n" + end + rest.partition(end)[2]
    PAGE.write_text(text)


def _measured(found: dict[str, Any]) -> list[str]:
    handed = found["hand_out"]
    on_sqlite = [row for row in handed if row["database"] == "sqlite"]
    busy = [row for row in handed if row["database"] == "postgres" and row["keys"] == 1]
    few, many = found["rows"][0], found["rows"][-1]
    quiet, most = found["idle"][-1], busy[-1]
    by_place = {row["where"]: row for row in found["takeover"]}
    sizes = many["sizes"]["lines"]["bytes"] / many["lines"]
    of_calls = [
        f"{many[name]['p50_ms'] / few[name]['p50_ms']:.1f} x" for name in ("claim", "record")
    ]
    rows = [
        ("PostgreSQL's processor time for a line", f"{most['postgres_cpu_ms_a_line']:.2f} ms"),
        ("statements for a line, answers' inserts included", f"{most['statements_a_line']:.1f}"),
        ("write-ahead log for a line", f"{most['wal_bytes_a_line'] / 1000:.1f} kB"),
        ("a stored line, before its answer", f"{sizes:.0f} bytes"),
        (f"lines a second, {_counts(busy)} replicas", _rates(busy)),
        (f"the same on SQLite, {_counts(on_sqlite)} replicas", _rates(on_sqlite)),
        (
            f"a claim and a record of 64 lines beside {many['lines']:,} stored lines, over "
            f"{few['lines']:,}",
            " and ".join(of_calls),
        ),
        (
            "a replica that has nothing to do",
            f"{quiet['statements_per_s_a_replica']:.1f} statements a second, "
            f"{quiet['postgres_cpu_ms_per_s_a_replica']:.1f} ms of PostgreSQL",
        ),
        ("connections of a replica", f"{quiet['connections'] / quiet['replicas']:.0f}"),
        *((f"takeover, {place}", _takeover(row)) for place, row in by_place.items()),
    ]
    return _table(("of the queue", "measured"), rows)


def _counts(rows: Sequence[dict[str, Any]]) -> str:
    return ", ".join(str(row["replicas"]) for row in rows)


def _rates(rows: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{row['lines_per_s']:.0f}" for row in rows)


def _takeover(row: dict[str, Any]) -> str:
    leases = [seconds / row["lease_s"] for seconds in row["running_again_s"]]
    return (
        f"{statistics.median(leases):.1f} leases ({min(leases):.1f} to {max(leases):.1f}, "
        f"{len(leases)} kills)"
    )


def _reckoned(rows: Sequence[dict[str, Any]]) -> list[str]:
    head = ("lines", "database's cores", "engines would run, lines/s", "run", "with failures",
            "replicas at most")  # fmt: skip
    return _table(
        head,
        [
            (
                f"{row['lines']}, {row['tokens_a_line']:,} tokens",
                str(row["database_cores"]),
                f"{row['engines_lines_per_s']:,.0f}",
                f"{row['of_the_engines']:.0%}",
                f"{row['with_failures']:.1%}",
                f"{row['most_replicas']:,}",
            )
            for row in rows
        ],
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(row)} |" for row in cells]
