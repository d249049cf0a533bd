"""What ran with which vLLM, kept in `results.json` beside this file; docs/versions.md shows it.

`python -m scripts.vllm_next.results` makes the page's table of it again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conserve.engine.versions import TRIED, release
from scripts.vllm_next.suite import Outcome
from scripts.vllm_next.surface import number

FILE = Path(__file__).with_name("results.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "versions.md"
BEGIN, END = "<!-- versions -->\n", "<!-- /versions -->\n"
HEAD = (
    "| vLLM | doors | tests without an engine | a real engine on CPUs | beside |\n"
    "| --- | ---: | --- | --- | --- |\n"
)

Row = dict[str, Any]
NOT_YET = "not run yet"


def read() -> dict[str, Row]:
    """Version -> what came of it; nothing of those that have not run yet."""
    kept: dict[str, Row] = json.loads(FILE.read_text())
    return kept


def counts(outcome: Outcome) -> Row:
    return {
        "passed": outcome.passed,
        "skipped": outcome.skipped,
        "failed": [line.removeprefix("failed: ") for line in outcome.failed],
    }


def keep(version: str, part: Row) -> None:
    """Write a part of a version's row, and the page's table."""
    rows = read()
    rows[version] = rows.get(version, {}) | part
    ordered = {one: rows[one] for one in sorted(rows, key=number)}
    FILE.write_text(json.dumps(ordered, indent=1) + "\n")
    PAGE.write_text(with_table(PAGE.read_text(), ordered))


def table(rows: dict[str, Row]) -> str:
    """The newest first; also of a release that has not run yet."""
    lines = {version: _line(version, rows[version]) for version in rows}
    for one in set(TRIED) - {release(version) for version in rows}:
        lines[one] = _line(one, {})
    return HEAD + "".join(lines[version] for version in sorted(lines, key=number, reverse=True))


def _line(version: str, row: Row) -> str:
    without = _counts(row["without_engine"]) if "without_engine" in row else NOT_YET
    engine = NOT_YET
    if "engine" in row:
        engine = f"{_counts(row['engine'])}, kernels of {row['kernels']}"
    cells = [version, str(row.get("doors", NOT_YET)), without, engine, row.get("beside", "")]
    return f"| {' | '.join(cells)} |\n"


def _counts(found: Row) -> str:
    words = [f"{found['passed']} passed"]
    words += [f"{found['skipped']} skipped"] if found["skipped"] else []
    words += [f"**{len(found['failed'])} failed**"] if found["failed"] else []
    return ", ".join(words)


def with_table(page: str, rows: dict[str, Row]) -> str:
    """The page with this table between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, behind = rest.partition(END)
    return before + BEGIN + table(rows) + END + behind


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(), read()))
