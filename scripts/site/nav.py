"""The order of the pages, as zensical.toml has it."""

import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def missing_from_nav(config: Path, pages: Path) -> list[str]:
    """Pages that are in no place of the navigation or in two, and places without their page."""
    places = Counter(nav_pages(tomllib.loads(config.read_text())["project"]["nav"]))
    listed = set(places)
    there = {
        path.relative_to(pages).as_posix()
        for pattern in ("*.md", "*.html")
        for path in pages.rglob(pattern)
    }
    return [
        *(f"{page} is in no place of nav in {config.name}" for page in sorted(there - listed)),
        *(f"nav in {config.name} names {page}, which is not" for page in sorted(listed - there)),
        *(f"nav in {config.name} names {page} twice" for page in sorted(places - Counter(listed))),
    ]


def nav_pages(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from nav_pages(entry)
