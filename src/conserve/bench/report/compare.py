"""Two result folders side by side, arm by arm; only what is comparable, unless told."""

from __future__ import annotations

from pathlib import Path

from conserve.bench.report.figures import ArmFigures, Figures, Spread, figures_of
from conserve.bench.report.tables import HEADLINE, Column, Table
from conserve.bench.store import Description, ResultError, ResultFolder
from conserve.workload import WHOLE


def compare_folders(before: Path, after: Path, anyway: bool = False) -> str:
    """A table for each point of the sweep, as Markdown.

    Raises ResultError when machine, model, scale or scenario differ and `anyway` is not set, and
    when no arm is in both.
    """
    old, new = ResultFolder(before), ResultFolder(after)
    differences = _differences(old.description(), new.description())
    if differences and not anyway:
        raise ResultError(
            f"not comparable: {'; '.join(differences)}. To compare all the same, add --anyway."
        )
    tables = _tables(figures_of(old), figures_of(new))
    if not tables:
        raise ResultError(f"{before} and {after} have no arm of the same point in common")
    lines = [f"Before: {before}. After: {after}.", ""]
    lines += [f"Warning: {difference}." for difference in differences]
    for table in tables:
        lines += [f"### {table.title}", "", table.markdown(), ""]
    return "\n".join(lines)


def _differences(old: Description, new: Description) -> list[str]:
    found = []
    for name in ("model", "machine"):
        a, b = getattr(old, name), getattr(new, name)
        if a != b:
            found.append(f"{name} {a} before, {b} after")
    a, b = old.workload(), new.workload()
    if old.scale != new.scale:
        found.append(
            f"scale {old.scale:g} before, {new.scale:g} after: other lengths, rates and targets "
            f"(`conserve bench run --scale {old.scale:g}` sends the same)"
        )
        # Everything else but the name follows from the scale.
        a, b = {"name": a["name"]}, {"name": b["name"]}
    changed = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
    if changed:
        found.append(f"the scenarios differ in {', '.join(changed)}")
    return found


def _tables(old: Figures, new: Figures) -> list[Table]:
    tables = []
    for point, arms in old.points.items():
        both = [arm for arm in arms if arm in new.points.get(point, {})]
        if both:
            rows = [
                [arm, *(_cell(column, arms[arm], new.points[point][arm]) for column in HEADLINE)]
                for arm in both
            ]
            title = "All" if point == WHOLE else point
            tables.append(Table(title, ["arm", *(c.heading for c in HEADLINE)], rows))
    return tables


def _cell(column: Column, old: ArmFigures, new: ArmFigures) -> str:
    """`0.60 -> 0.52 (0.87x)`; a `*` when the seeds' ranges do not overlap."""
    a, b = old.get(column.name), new.get(column.name)
    if a is None or b is None:
        return "-"
    text = f"{column.text(a, with_spread=False)} -> {column.text(b, with_spread=False)}"
    if a.median:
        text += f" ({b.median / a.median:.2f}x)"
    return f"{text} *" if _apart(a, b) else text


def _apart(a: Spread, b: Spread) -> bool:
    several = a.num_seeds > 1 and b.num_seeds > 1
    return several and (a.high < b.low or b.high < a.low)
