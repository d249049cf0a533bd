"""The table of docs/models.md, made of `results.json`.

python -m tests.models.page
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models.family import ON
from tests.models.registry import KINDS
from tests.models.results import Row, read

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- matrix -->\n", "<!-- /matrix -->\n"
HEAD = (
    "| family | layers | groups | prompts | stops | checkpoints |\n"
    "| --- | --- | ---: | --- | --- | --- |\n"
)


def table(results: dict[str, Any]) -> str:
    """In the order of the registry, one line for each family that has a result."""
    rows = results["families"]
    names = [name for families in KINDS.values() for name in families if name in rows]
    made = f"\nPlayed with vLLM {results['vllm']} on {results['processor']}.\n"
    return HEAD + "".join(_line(name, rows[name]) for name in names) + made


def _line(name: str, row: Row) -> str:
    if "refusal" in row:
        return f"| {name} | {row['layers']} | | | vLLM: `{row['refusal']}` | |\n"
    prompts = "in parts" if row["cuts_prompts"] else "whole"
    on = (_on(row[what]) for what in ("stops", "checkpoints"))
    return f"| {' | '.join([name, row['layers'], str(row['num_groups']), prompts, *on])} |\n"


def _on(said: str) -> str:
    return "on" if said == ON else f"off: {said}"


def with_table(page: str, results: dict[str, Any]) -> str:
    """The page with this table between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, behind = rest.partition(END)
    return before + BEGIN + table(results) + END + behind


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(), read()))
