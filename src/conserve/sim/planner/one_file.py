"""The page with all that it needs inside, so that it is read from a disk, a mail or any site."""

from __future__ import annotations

import html
import json
import re
from importlib.resources import files
from typing import Any

from conserve.core.settings import CHAT_SLOWDOWN

SCRIPTS = ("words.js", "figures.js", "chart.js", "app.js")
"""In the order in which each finds what it imports; their names are told apart."""
IMPORT = re.compile(r"^import .*?;\n", re.MULTILINE | re.DOTALL)
STYLE = '<link rel="stylesheet" href="planner.css">'
SCRIPT = '<script type="module" src="app.js"></script>'
DATA = '<script id="grid" type="application/json"></script>'
HOME = "<!-- home -->"


def load_grid() -> dict[str, Any]:
    """What the simulator found, as `benchmarks/planner_grid.py` wrote it."""
    grid: dict[str, Any] = json.loads(_text("grid.json"))
    return grid


def one_file(grid: dict[str, Any] | None = None, *, home: str = "") -> str:
    """The page as HTML, of `grid` or of the one that comes with us. home: a link back, if any."""
    found = (grid or load_grid()) | {"levels": CHAT_SLOWDOWN}
    data = json.dumps(found, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        STYLE: f"<style>\n{_text('page', 'planner.css')}</style>",
        SCRIPT: f'<script type="module">\n{_script()}</script>',
        DATA: DATA.replace("></", f">{data}</"),
        HOME: f'<a href="{html.escape(home)}">ConServe</a>' if home else "ConServe",
    }
    page = _text("page", "index.html")
    for marker, text in parts.items():
        if page.count(marker) != 1:
            raise ValueError(f"index.html: not exactly one {marker}")
        page = page.replace(marker, text)
    return page


def _script() -> str:
    """All modules as one: what they import from each other stands above them."""
    modules = (IMPORT.sub("", _text("page", name)) for name in SCRIPTS)
    return "\n".join(re.sub(r"^export ", "", text, flags=re.MULTILINE) for text in modules)


def _text(*path: str) -> str:
    return files("conserve.sim.planner").joinpath(*path).read_text(encoding="utf-8")
