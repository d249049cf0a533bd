"""No page says again what another says: each fact has one home, and the others link to it."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = 9
"""Words in a row that two pages have in common: of so many, chance is no cause."""
ALLOWED = 12
"""Such runs that two pages may have: a name with its article, the head of a table."""
FIGURES = re.compile(
    r"<!-- (bench:\S+).*?<!-- /bench -->|```.*?```|^    .*?$", re.DOTALL | re.MULTILINE
)


def runs(text: str) -> set[tuple[str, ...]]:
    """Every run of words outside of code and of measured tables."""
    without_targets = re.sub(r"\]\([^)]*\)", "]", FIGURES.sub("", text))
    words = re.findall(r"[a-z0-9_-]*[a-z0-9][a-z0-9_-]*", without_targets.lower())
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


def repeated(texts: dict[str, str]) -> dict[tuple[str, ...], list[str]]:
    """Pages that have more in common than is allowed, and what."""
    owners = defaultdict(set)
    for name, text in texts.items():
        for run in runs(text):
            owners[run].add(name)
    shared = defaultdict(list)
    for run, names in owners.items():
        if len(names) > 1:
            shared[tuple(sorted(names))].append(" ".join(run))
    return {names: found for names, found in shared.items() if len(found) > ALLOWED}


def test_no_page_repeats_another() -> None:
    assert repeated({str(p.relative_to(ROOT)): p.read_text() for p in PAGES}) == {}


def test_a_paragraph_that_stands_twice_is_noticed() -> None:
    serving = (ROOT / "docs" / "serving.md").read_text()
    paragraph = next(p for p in serving.split("\n\n") if p.startswith("A server killed with"))
    other = (ROOT / "docs" / "fleet.md").read_text() + "\n\n" + paragraph
    assert list(repeated({"serving": serving, "fleet": other})) == [("fleet", "serving")]
