"""Which fields of the feed the page's JavaScript names, and those among them that are none.

The page calls each record by the name given here, and takes its fields by `record.field`, or apart
with braces; columns of a point are named by `points.column` or as a string in figures.js.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, get_args

from msgspec import Struct
from msgspec.structs import fields

from conserve.server.dashboard.messages import (
    Batch,
    Batches,
    Bye,
    Chat,
    Counts,
    Event,
    Facts,
    Harvest,
    Hello,
    LastEvents,
    Memory,
    Point,
    Requests,
    Server,
    Standing,
    Starving,
    Summary,
    Tick,
    Yields,
)

RECORDS: dict[str, type[Struct]] = {
    "facts": Facts,
    "points": Point,
    "summary": Summary,
    "server": Server,
    "chat": Chat,
    "harvest": Harvest,
    "standing": Standing,
    "starving": Starving,
    "requests": Requests,
    "memory": Memory,
    "yields": Yields,
    "happened": Event,
    "batches": Batches,
    "batch": Batch,
    "counts": Counts,
}
HANDLERS: dict[str, type[Struct]] = {
    "hello": Hello,
    "tick": Tick,
    "events": LastEvents,
    "bye": Bye,
}
"""The functions that take a message apart, by name."""

PATH = re.compile(r"(?<![\w\"/])(?P<name>[a-z]+)(?:\(\))?(?P<path>(?:\??\.[A-Za-z_]\w*)+)")
APART = re.compile(r"\{(?P<names>[^{}=;()]+)\} = (?:page\.)?(?P<name>[a-z]+)(?P<path>(?:\.\w+)*);")
HANDLER = re.compile(r"^function (?P<name>\w+)\(\{(?P<names>[^{}]+)\}\)", re.MULTILINE)
COLUMN = re.compile(r"\"([a-z0-9]+(?:_[a-z0-9]+)+)\"")

Read = tuple[type[Struct], str]


def reads(page: Mapping[str, str]) -> Iterator[Read]:
    """Record and field of each place where `page`, texts by file name, names one."""
    for name, text in page.items():
        for found in PATH.finditer(text):
            if found["name"] in RECORDS:
                yield from _along(RECORDS[found["name"]], re.findall(r"\w+", found["path"]))
        for found in APART.finditer(text):
            if found["name"] in RECORDS:
                path = re.findall(r"\w+", found["path"])
                record = _end(RECORDS[found["name"]], path)
                yield from ((record, each) for each in _taken(found["names"]))
        for found in HANDLER.finditer(text):
            if found["name"] in HANDLERS:
                yield from ((HANDLERS[found["name"]], each) for each in _taken(found["names"]))
        if name == "figures.js":
            yield from ((Point, column) for column in COLUMN.findall(text))


def unknown(page: Mapping[str, str]) -> list[str]:
    """The reads of what no record has."""
    found = (f"{record.__name__}.{name}" for record, name in reads(page) if not has(record, name))
    return sorted(set(found))


def has(record: type[Struct], name: str) -> bool:
    return name in record.__struct_fields__


def _taken(names: str) -> list[str]:
    """`{ a, b: c }` takes a and b."""
    return [part.partition(":")[0].strip() for part in names.split(",")]


def _along(record: type[Struct], path: list[str]) -> Iterator[Read]:
    """Each step that is taken from a record; what follows a plain value is JavaScript's own."""
    for name in path:
        yield record, name
        inner = _record_in(record, name)
        if inner is None:
            return
        record = inner


def _end(record: type[Struct], path: list[str]) -> type[Struct]:
    for name in path:
        record = _record_in(record, name) or record
    return record


def _record_in(record: type[Struct], name: str) -> type[Struct] | None:
    kinds: dict[str, Any] = {field.name: field.type for field in fields(record)}
    if name not in kinds:
        return None
    options = get_args(kinds[name]) if isinstance(kinds[name], UnionType) else (kinds[name],)
    return next((one for one in options if isinstance(one, type) and issubclass(one, Struct)), None)
