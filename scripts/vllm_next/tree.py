"""A tree of Python files, read without importing it: where a name is defined, and how it is called.

So it can be asked of a vLLM whose dependencies are not installed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Imported = tuple[str, str]
"""(module, name in it); the name is empty where the module itself is meant."""
HOPS = 20
"""Re-exports and bases that a name is followed through."""


@dataclass
class Module:
    """The top of one file, with what stands below `if` and `try` there."""

    name: str
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    imports: dict[str, Imported] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)
    words: dict[str, str] = field(default_factory=dict)
    """Entries of dictionaries of text, in which packages note what they import when asked."""
    mentioned: set[str] = field(default_factory=set)
    """Other text in it: a module's `__getattr__` names what it makes."""


@dataclass(frozen=True)
class Found:
    """What a name stands for: a module (no node), a class, a function or a value."""

    module: Module
    node: ast.stmt | None = None


class Tree:
    def __init__(self, root: Path) -> None:
        """`root` is the folder that the package lies in."""
        self.root = root
        self.module = lru_cache(maxsize=None)(self._read)

    def _path(self, name: str) -> Path | None:
        path = self.root.joinpath(*name.split("."))
        files = (path.with_suffix(".py"), path / "__init__.py")
        return next((file for file in files if file.exists()), None)

    def _read(self, name: str) -> Module | None:
        path = self._path(name)
        if path is None:
            return None
        parsed = ast.parse(path.read_text(encoding="utf-8"))
        module = Module(name)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for statement in _top(parsed.body):
            _take(module, statement, package)
        for node in ast.walk(parsed):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                module.mentioned.add(node.value)
        return module

    def find(self, path: str) -> Found | None:
        """What `module:Name` or `module:Name.member` is; `module:` is the module itself. Of
        several, with a bar between, the first that is there."""
        first, bar, others = path.partition("|")
        if bar:
            return self.find(first) or self.find(others)
        name, _, inner = path.partition(":")
        module = self.module(name)
        found = Found(module) if module else None
        for word in filter(None, inner.split(".")):
            if found is None:
                return None
            found = self._inside(found, word)
        return found

    def _inside(self, found: Found, name: str) -> Found | None:
        if found.node is None:
            return self._named(found.module, name)
        if isinstance(found.node, ast.ClassDef):
            return self.member(found, name)
        return found  # of a value, or what a function returns, nothing is known

    def _named(self, module: Module, name: str, hops: int = HOPS) -> Found | None:
        """What stands behind a name at the top of a module."""
        if not hops:
            return None
        node = module.definitions.get(name)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
            return self._named(module, node.value.id, hops - 1) or Found(module, node)
        if node is not None:
            return Found(module, node)
        if name in module.imports:
            return self._imported(*module.imports[name], hops - 1)
        for star in module.stars:
            other = self.module(star)
            if other and (found := self._named(other, name, hops - 1)):
                return found
        return self._late(module, name, hops - 1)

    def _imported(self, name: str, inner: str, hops: int) -> Found | None:
        other = self.module(name)
        if other is None:
            return None
        return self._named(other, inner, hops) if inner else Found(other)

    def _late(self, module: Module, name: str, hops: int) -> Found | None:
        """A submodule, or what the module makes when it is asked for it."""
        if submodule := self.module(f"{module.name}.{name}"):
            return Found(submodule)
        place, _, inner = module.words.get(name, "").rpartition(":")
        if place:
            return self._imported(_absolute(place, module.name), inner, hops)
        return Found(module, ast.Pass()) if name in module.mentioned else None

    def bases(self, found: Found) -> Iterator[Found]:
        """The classes that a class derives from and that are in this tree."""
        assert isinstance(found.node, ast.ClassDef)
        for base in found.node.bases:
            bare = base.value if isinstance(base, ast.Subscript) else base
            words = ast.unparse(bare).split(".")
            other: Found | None = Found(found.module)
            for word in words:
                other = self._inside(other, word) if other else None
            if other and isinstance(other.node, ast.ClassDef):
                yield other

    def member(self, found: Found, name: str, hops: int = HOPS) -> Found | None:
        """A method, an attribute of the class or one that a method gives `self`."""
        assert isinstance(found.node, ast.ClassDef)
        if node := own_members(found.node).get(name):
            return Found(found.module, node)
        for base in self.bases(found) if hops else ():
            if inherited := self.member(base, name, hops - 1):
                return inherited
        return None

    def abstract(self, found: Found, hops: int = HOPS) -> set[str]:
        """Methods that a class leaves to those that derive from it."""
        assert isinstance(found.node, ast.ClassDef)
        members = own_members(found.node)
        left = {name for name, node in members.items() if _is_abstract(node)}
        for base in self.bases(found) if hops else ():
            left |= self.abstract(base, hops - 1) - members.keys()
        return left


def _top(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        yield statement
        for part in ("body", "orelse", "handlers", "finalbody"):
            if not isinstance(statement, Function | ast.ClassDef):
                yield from _top(getattr(statement, part, []))


def _take(module: Module, statement: ast.stmt, package: str) -> None:
    if isinstance(statement, Function | ast.ClassDef):
        module.definitions.setdefault(statement.name, statement)
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for target in targets:
            if isinstance(target, ast.Name):
                module.definitions.setdefault(target.id, statement)
        if isinstance(statement.value, ast.Dict):
            module.words |= _words(statement.value)
    elif isinstance(statement, ast.Import):
        for alias in statement.names:
            name = alias.asname or alias.name.partition(".")[0]
            module.imports.setdefault(name, (alias.name, ""))
    elif isinstance(statement, ast.ImportFrom):
        _take_from(module, statement, package)


def _take_from(module: Module, statement: ast.ImportFrom, package: str) -> None:
    dots = "." * statement.level
    origin = _absolute(dots + (statement.module or ""), package)
    for alias in statement.names:
        if alias.name == "*":
            module.stars.append(origin)
        else:
            module.imports.setdefault(alias.asname or alias.name, (origin, alias.name))


def _words(values: ast.Dict) -> dict[str, str]:
    pairs = zip(values.keys, values.values, strict=True)
    return {
        key.value: value.value
        for key, value in pairs
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
        and isinstance(value, ast.Constant) and isinstance(value.value, str)
    }  # fmt: skip


def _absolute(name: str, package: str) -> str:
    bare = name.lstrip(".")
    for _ in range(len(name) - len(bare) - 1):
        package = package.rpartition(".")[0]
    return ".".join(filter(None, [package, bare])) if name != bare else bare


def own_members(node: ast.ClassDef) -> dict[str, ast.stmt]:
    """What the body of a class defines, and what its methods give `self`."""
    found: dict[str, ast.stmt] = {}
    for statement in _top(node.body):
        if isinstance(statement, Function | ast.ClassDef):
            found.setdefault(statement.name, statement)
        for target in _targets(statement):
            if isinstance(target, ast.Name):
                found.setdefault(target.id, statement)
    for inside in ast.walk(node):
        for target in _targets(inside):
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                assert isinstance(inside, ast.stmt)
                found.setdefault(target.attr, inside)
    return found


def _targets(statement: ast.AST) -> list[ast.expr]:
    if isinstance(statement, ast.Assign):
        return [t for target in statement.targets for t in getattr(target, "elts", [target])]
    return [statement.target] if isinstance(statement, ast.AnnAssign) else []


def _decorators(node: ast.stmt) -> set[str]:
    if not isinstance(node, Function):
        return set()
    return {ast.unparse(one).rpartition(".")[2] for one in node.decorator_list}


def _is_abstract(node: ast.stmt) -> bool:
    return any(word.startswith("abstract") for word in _decorators(node))


def describe(node: ast.stmt | None) -> str:
    """In a word what a name stands for; of a function, how it is called."""
    if node is None:
        return "module"
    if isinstance(node, ast.ClassDef):
        return "class"
    if not isinstance(node, Function):
        return "value"
    return "property" if "property" in _decorators(node) else f"({', '.join(parameters(node))})"


def parameters(node: Function) -> list[str]:
    """In order, without annotations: `request`, `timeout=None`, `*`, `*args`, `**kwargs`."""
    asked = node.args
    plain = [*asked.posonlyargs, *asked.args]
    missing: list[ast.expr | None] = [None] * (len(plain) - len(asked.defaults))
    pairs = zip(plain, [*missing, *asked.defaults], strict=True)
    found = [_parameter(one, default) for one, default in pairs]
    if asked.vararg or asked.kwonlyargs:
        found.append(f"*{asked.vararg.arg if asked.vararg else ''}")
    named = zip(asked.kwonlyargs, asked.kw_defaults, strict=True)
    found += [_parameter(one, default) for one, default in named]
    return found + ([f"**{asked.kwarg.arg}"] if asked.kwarg else [])


def _parameter(one: ast.arg, default: ast.expr | None) -> str:
    return one.arg if default is None else f"{one.arg}={ast.unparse(default)}"
