"""What our source uses of vLLM, read from the source itself: what is imported through the doors,
which classes are derived from, which methods overridden, which functions called or replaced.

A value is followed from where a door is named: through assignments, attributes, and into
functions of ours that it is given to.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from scripts.vllm_next.tree import Function, parameters

DOOR = "conserve.engine.door"
DOORS = DOOR + ":"
"""What the module of the doors itself stands for."""
SERVER_DOOR = "conserve.server.door"


@dataclass(frozen=True, order=True)
class Use:
    path: str
    """`module:Name.member` of vLLM's; several, with a bar between, where one of them will do."""
    how: str
    """imported, derived from, overridden, replaced, called or read."""
    where: str
    """file:line of ours."""
    has: frozenset[str] = frozenset()
    """Of a class that is derived from: what ours defines."""


@dataclass(frozen=True)
class Source:
    """One module of ours."""

    name: str
    file: str
    tree: ast.Module

    def functions(self) -> dict[str, Function]:
        return {node.name: node for node in self.tree.body if isinstance(node, Function)}


def sources(package: Path) -> dict[str, Source]:
    """Every module of the package in that folder, by name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package)
        words = [package.name, *file.with_suffix("").parts]
        name = ".".join(words).removesuffix(".__init__")
        found[name] = Source(name, file.as_posix(), ast.parse(path.read_text(encoding="utf-8")))
    return found


def table(source: Source, name: str) -> dict[str, object]:
    """The dictionary of that name at the top of the module."""
    for node in source.tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            values: dict[str, object] = ast.literal_eval(node.value)
            return values
    raise LookupError(f"{source.file} has no table {name}")


def door_paths(source: Source) -> dict[str, str]:
    """The table of the engine's doors -> `module:Name`."""
    found = {}
    for name, place in table(source, "DOORS").items():
        paths = str(place).split("|")
        found[name] = "|".join(path if ":" in path else f"{path}:{name}" for path in paths)
    return found


class Collector:
    def __init__(self, package: Path) -> None:
        self._sources = sources(package)
        self._doors = door_paths(self._sources[DOOR])
        self._seen: set[tuple[str, str, tuple[tuple[str, str], ...]]] = set()
        self.found: set[Use] = set()

    def collect(self) -> list[Use]:
        door = self._sources[DOOR]
        self.found = {Use(path, "imported", door.file) for path in self._doors.values()}
        self._note_methods(door)
        for source in self._sources.values():
            names = self._imports(source)
            if source.name == SERVER_DOOR:
                self._note_imports(source)
            if names:
                self._classes(source, names)
                self._walk(source, source.tree, names)
        return sorted(self.found)

    def _imports(self, source: Source) -> dict[str, str]:
        """Names of a module that stand for something of vLLM's."""
        names: dict[str, str] = {}
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ImportFrom) and not node.level:
                for alias in node.names:
                    path = self._imported(node.module or "", alias.name)
                    if path:
                        names[alias.asname or alias.name] = path
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.partition(".")[0] == "vllm":
                        names[alias.asname or "vllm"] = (
                            alias.name if alias.asname else "vllm"
                        ) + ":"
        return names

    def _imported(self, module: str, name: str) -> str:
        if module == DOOR:
            return self._doors.get(name, "")
        if f"{module}.{name}" == DOOR:
            return DOORS
        return f"{module}:{name}" if module.partition(".")[0] == "vllm" else ""

    def _note_imports(self, source: Source) -> None:
        for node in source.tree.body:
            places: dict[str, list[str]] = {}
            for one in ast.walk(node):  # one import, or a `try` with another where it fails
                if isinstance(one, ast.ImportFrom):
                    for alias in one.names:
                        if path := self._imported(one.module or "", alias.name):
                            places.setdefault(alias.asname or alias.name, []).append(path)
            for paths in places.values():
                self._note("|".join(paths), "imported", source, node)

    def _note_methods(self, door: Source) -> None:
        """Those that our parts call of what vLLM gives them, as the doors list them."""
        for owner, methods in table(door, "METHODS").items():
            assert isinstance(methods, tuple)
            for method in methods:
                self._note(f"{self._doors[owner]}.{method}", "called", door, door.tree)

    def _note(
        self, path: str, how: str, source: Source, node: ast.AST, has: frozenset[str] = frozenset()
    ) -> None:
        where = f"{source.file}:{node.lineno}" if hasattr(node, "lineno") else source.file
        self.found.add(Use(path, how, where, has))

    def _classes(self, source: Source, names: Mapping[str, str]) -> None:
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.ClassDef):
                continue
            methods = {one.name: one for one in node.body if isinstance(one, Function)}
            for path in filter(None, (self._path(base, names) for base in node.bases)):
                self._note(path, "derived from", source, node, frozenset(methods))
                for name, method in methods.items():
                    self._note(f"{path}.{name}", "overridden", source, method)

    def _path(self, node: ast.expr, names: Mapping[str, str]) -> str:
        """What of vLLM's an expression is, or nothing."""
        if isinstance(node, ast.Name):
            return names.get(node.id, "")
        if isinstance(node, ast.Attribute) and (owner := self._path(node.value, names)):
            if owner == DOORS:
                return self._doors.get(node.attr, "")
            places = owner.split("|")
            return "|".join(p + ("" if p.endswith(":") else ".") + node.attr for p in places)
        return ""

    def _walk(self, source: Source, scope: ast.AST, names: dict[str, str]) -> None:
        """Note what is done with those names in a module or function, in the order of its text."""
        for node in _in_order(scope):
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                target = node.targets[0]
                path = self._path(node.value, names)
                if isinstance(target, ast.Name) and path:
                    names[target.id] = path
            if isinstance(node, ast.Attribute) and (path := self._path(node, names)):
                self._note(path, _how(node), source, node)
            if isinstance(node, ast.Call):
                self._follow(source, node, names)

    def _follow(self, source: Source, call: ast.Call, names: Mapping[str, str]) -> None:
        """Into a function of ours that is given something of vLLM's."""
        given = [self._path(argument, names) for argument in call.args]
        if not any(path and path != DOORS for path in given):
            return
        home, function = self._function(source, call.func)
        if function is None or home is None:
            return
        asked = [one.partition("=")[0] for one in parameters(function)]
        bound = {name: path for name, path in zip(asked, given, strict=False) if path}
        key = (home.name, function.name, tuple(sorted(bound.items())))
        if key not in self._seen:
            self._seen.add(key)
            self._walk(home, function, self._imports(home) | bound)

    def _function(self, source: Source, called: ast.expr) -> tuple[Source | None, Function | None]:
        if not isinstance(called, ast.Name):
            return None, None
        if called.id in source.functions():
            return source, source.functions()[called.id]
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ImportFrom) and node.module in self._sources:
                for alias in node.names:
                    if (alias.asname or alias.name) == called.id:
                        home = self._sources[node.module]
                        return home, home.functions().get(alias.name)
        return None, None


def _in_order(scope: ast.AST) -> Iterator[ast.AST]:
    """All nodes below it; an assignment before what follows it."""
    for child in ast.iter_child_nodes(scope):
        yield child
        yield from _in_order(child)


def _how(node: ast.Attribute) -> str:
    return "replaced" if isinstance(node.ctx, ast.Store) else "read"


def collect(package: Path) -> list[Use]:
    """Everything that the package in that folder uses of vLLM, by what it is."""
    return Collector(package).collect()
