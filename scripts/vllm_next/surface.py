"""What vLLM shows at our doors: each thing that our source uses of it, in one line of text.

`doors.json` keeps it for every version that is supported, so that an upgrade is compared with what
was tried; `make vllm-next` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from scripts.vllm_next.tree import Tree, describe
from scripts.vllm_next.uses import Use

RECORD = Path(__file__).with_name("doors.json")

Surface = dict[str, str]
"""`module:Name.member` -> `class`, `value`, `module`, `property`, or the parameters in brackets."""

OPEN = "class, leaves open "
"""How a class begins that leaves methods to those that derive from it."""

ORDER = ("overridden", "replaced", "derived from", "called", "read", "imported")
"""From what an upgrade breaks first to what it breaks last."""
AS_THEIRS = ("overridden", "replaced")
"""vLLM calls ours in the place of its own: it must take whatever that takes."""


def surface(tree: Tree, uses: Iterable[Use]) -> Surface:
    """Of what is used, all that this tree has."""
    found: Surface = {}
    for path, all_uses in by_path(uses).items():
        there = tree.find(path)
        if there is None:
            continue
        left = tree.abstract(there) if any(u.how == "derived from" for u in all_uses) else set()
        found[path] = OPEN + ", ".join(sorted(left)) if left else describe(there.node)
    return found


def by_path(uses: Iterable[Use]) -> dict[str, list[Use]]:
    """Of each thing its uses, those first that an upgrade breaks first."""
    found: dict[str, list[Use]] = {}
    for use in uses:
        found.setdefault(use.path, []).append(use)
    for uses_of_one in found.values():
        uses_of_one.sort(key=lambda use: (ORDER.index(use.how), use.where))
    return {path: found[path] for path in sorted(found)}


def breaks(old: Surface, new: Surface, uses: Iterable[Use]) -> Iterator[str]:
    """A line for each thing of `old` that our use of it does not survive in `new`."""
    for path, all_uses in by_path(uses).items():
        first = all_uses[0]
        used = f"({first.how} in {first.where})"
        if path not in new:
            if path in old:
                yield f"gone: {path} {used}"
            continue
        if missing := lacking(new[path], all_uses):
            yield f"open: {path} leaves {', '.join(missing)} to who derives from it {used}"
        if path in old and (why := misfit(old[path], new[path], strict=first.how in AS_THEIRS)):
            yield f"changed: {path} {why} {used}"


def lacking(text: str, uses: Iterable[Use]) -> list[str]:
    """Methods that a class leaves open and that ours, derived from it, does not have."""
    left = set(text.removeprefix(OPEN).split(", ")) if text.startswith(OPEN) else set()
    ours = [use.has for use in uses if use.how == "derived from"]
    return sorted(name for name in left if not all(name in has for has in ours))


def misfit(old: str, new: str, *, strict: bool) -> str:
    """Why what fits the old one may not fit the new one, or nothing. `strict` where we stand in its
    place: then every difference counts."""
    kind, other = old.partition(",")[0], new.partition(",")[0]
    if not (old.startswith("(") and new.startswith("(")):
        return "" if kind == other else f"is {other}, not {kind}"
    if old == new:
        return ""
    change = f"takes {new}, not {old}"
    if strict:
        return change
    had, has = _parameters(old), _parameters(new)
    kept = [name for name in has if name in had]
    if kept != list(had) and "**" not in new:
        return change
    needed = [name for name in has if name not in had and has[name] and not name.startswith("*")]
    return change if needed else ""


def _parameters(text: str) -> dict[str, bool]:
    """Name -> whether it has to be given."""
    words = _split(text[1:-1])
    return {word.partition("=")[0]: "=" not in word for word in words}


def _split(text: str) -> list[str]:
    """At commas that stand in no bracket and no quotation of a default."""
    found, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth and not quote:
            found.append("")
        else:
            found[-1] += letter
    return [word.strip() for word in found if word.strip()]


def read_record() -> dict[str, Surface]:
    """Version -> what it shows at our doors."""
    kept: dict[str, Surface] = json.loads(RECORD.read_text())
    return kept


def keep(version: str, shown: Surface) -> None:
    """Put it into the record, in the order of the versions."""
    record = (read_record() if RECORD.exists() else {}) | {version: shown}
    ordered = {one: record[one] for one in sorted(record, key=number)}
    RECORD.write_text(json.dumps(ordered, indent=1, sort_keys=False) + "\n")


def number(version: str) -> tuple[int, ...]:
    """To order versions by."""
    return tuple(int(word) for word in version.partition("+")[0].split(".") if word.isdigit())


def before(version: str) -> str:
    """The newest recorded version that is older; the oldest where none is."""
    known = sorted(read_record(), key=number)
    return next((one for one in reversed(known) if number(one) < number(version)), known[0])
