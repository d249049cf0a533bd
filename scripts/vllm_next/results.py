"""What ran with which vLLM, kept in `results.json` beside this file; docs/versions.md shows it.

`python -m scripts.vllm_next.results` makes the page's table of it again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def read() -> dict[str, Row]:
    """Version -> what came of it."""
    kept: dict[str, Row] = json.loads(FILE.read_text())
    return kept


def counts(outcome: Outcome) -> Row:
    return {
        "passed": outcome.passed,
        "skipped": outcome.skipped,
        "failed": [line.removeprefix("failed: ") for line in outcome.failed],
    }


def keep(version: str, row: Row) -> None:
    """Write a version's row, and the page's table."""
    rows = (read() if FILE.exists() else {}) | {version: row}
    ordered = {one: rows[one] for one in sorted(rows, key=number)}
    FILE.write_text(json.dumps(ordered, indent=1) + "\n")
    PAGE.write_text(with_table(PAGE.read_text(), ordered))


def table(rows: dict[str, Row]) -> str:
    """The newest first."""
    return HEAD + "".join(_line(version, rows[version]) for version in reversed(rows))


def _line(version: str, row: Row) -> str:
    engine = f"{_counts(row['engine'])}, kernels of {row['kernels']}"
    cells = [version, str(row["doors"]), _counts(row["without_engine"]), engine, row["beside"]]
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
