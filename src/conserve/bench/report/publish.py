"""Results in the repository, and the documents' numbers made from them.

A document holds what it quotes between two comments, the first at the beginning of a line:

    <!-- bench:burst headline --> ... <!-- /bench -->

where `burst` is a folder of benchmarks/results and `headline` one of QUOTES; a point of a sweep
follows the folder after a colon (`bench:gamma:rate-1 ratios`). A scenario without a result reads
"Not measured yet.".
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from conserve.bench.report.figures import Figures, read_figures
from conserve.bench.report.tables import (
    HEADLINE,
    KV_COPIES,
    LATENCY,
    STOPS,
    THROUGHPUT,
    Column,
    Table,
    first_token_table,
    history_table,
    ratio_table,
    table,
)
from conserve.bench.report.write import write_report
from conserve.bench.store import ResultError, ResultFolder

RESULTS = Path("benchmarks/results")
SCENARIOS = Path("src/conserve/workload/scenarios")
NOT_YET = "Not measured yet."
DOCUMENTS = ("README.md", "docs/**/*.md")
MARKED = re.compile(
    r"^(?P<open><!-- bench:(?P<result>[\w.-]+)(?::(?P<point>[\w.-]+))? (?P<quote>[\w-]+) -->)"
    r"(?P<text>.*?)(?P<close><!-- /bench -->)",
    re.DOTALL | re.MULTILINE,
)
MOST_BYTES = 6 * 2**20

Quote = Callable[[Figures, str], str]


def _quote(columns: Sequence[Column], *, with_spread: bool = True) -> Quote:
    """A table of the arms that have any of these figures."""
    names = {column.name for column in columns}

    def fill(figures: Figures, point: str) -> str:
        arms = {arm: f for arm, f in figures.points[point].items() if names & f.keys()}
        return table("", columns, arms, with_spread).markdown()

    return fill


def _markdown(table: Table | None) -> str:
    return NOT_YET if table is None else table.markdown()


QUOTES: dict[str, Quote] = {
    "headline": _quote(HEADLINE, with_spread=False),
    "latency": _quote(LATENCY),
    "throughput": _quote(THROUGHPUT),
    "copies": _quote(KV_COPIES, with_spread=False),
    "stops": _quote(STOPS, with_spread=False),
    "first-tokens": lambda figures, point: _markdown(first_token_table(figures.points[point])),
    "histories": lambda figures, point: _markdown(history_table(figures, point)),
    "ratios": lambda figures, point: ratio_table(figures, point).markdown(),
}


def publish_result(folder: Path, root: Path, name: str = "") -> list[str]:
    """Copy a result without its logs to benchmarks/results, under its scenario's name unless
    another is given, and fill every document in.

    Returns what was done, one line each. Raises ResultError for a folder with failed runs, one
    that is too large, a name that no marker could hold, or a marker that names nothing.
    """
    source = ResultFolder(folder)
    name = name or source.description().scenario["name"]
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise ResultError(f"--name {name!r}: letters, digits, dots, dashes and underscores only")
    left = [key for key in source.failures() if not source.has(key)]
    if left:
        raise ResultError(f"{folder}: {left[0]} failed; run it again before publishing")
    write_report(folder)
    target = root / RESULTS / name
    _copy(folder, target)
    return [f"wrote {target}", *fill_documents(root)]


def fill_documents(root: Path) -> list[str]:
    """Put each marker's numbers in; returns the documents that changed. Raises ResultError."""
    changed = []
    for document in sorted({path for pattern in DOCUMENTS for path in root.glob(pattern)}):
        before = document.read_text(encoding="utf-8")
        after = MARKED.sub(lambda found: _filled(found, root), before)
        if after != before:
            document.write_text(after, encoding="utf-8")
            changed.append(f"filled in {document}")
    return changed


def _filled(found: re.Match[str], root: Path) -> str:
    path = root / RESULTS / found["result"] / "figures.json"
    if not path.is_file():
        if not (root / SCENARIOS / f"{found['result']}.toml").is_file():
            raise ResultError(f"{found['open']}: neither a result nor a scenario of that name")
        return f"{found['open']}\n{NOT_YET}\n{found['close']}"
    figures = read_figures(path)
    point = found["point"] or next(iter(figures.points))
    if point not in figures.points:
        raise ResultError(f"{found['open']}: points are {', '.join(figures.points)}")
    if found["quote"] not in QUOTES:
        raise ResultError(f"{found['open']}: quotes are {', '.join(QUOTES)}")
    return f"{found['open']}\n{QUOTES[found['quote']](figures, point)}\n{found['close']}"


def _copy(folder: Path, target: Path) -> None:
    size = sum(file.stat().st_size for file in folder.rglob("*") if _published(file, folder))
    if size > MOST_BYTES:
        raise ResultError(f"{folder}: {size / 2**20:.1f} MiB is too much to commit")
    if target.resolve() == folder.resolve():
        return
    if target.exists():
        shutil.rmtree(target)
    for file in sorted(folder.rglob("*")):
        if _published(file, folder):
            place = target / file.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


def _published(file: Path, folder: Path) -> bool:
    inside = file.relative_to(folder)
    kept = inside.parts[0] != "logs" and not file.name.startswith("partial-")
    return file.is_file() and kept and file.name != "failures.json"
