"""A tree of Python files is read without importing it."""

from __future__ import annotations

import pytest

from scripts.vllm_next.tree import Tree, describe

FILES = {
    "lib/__init__.py": """
LATE = {"Soon": ".near:Soon"}
def __getattr__(name):
    if name == "made":
        return object()
""",
    "lib/near.py": """
from abc import ABC, abstractmethod
from . import far as distant
from .far import *
from lib.far import Base as Renamed
try:
    from lib.nowhere import other
except ImportError:
    def other(): ...
if True:
    VALUE = 3
ALIAS = Renamed
class Soon(Renamed, distant.Plain):
    limit: int = 1
    def __init__(self, a, *, b=(1, 2)):
        self.first, self.second = a, b
    @property
    def size(self): ...
""",
    "lib/far.py": """
from abc import ABC, abstractmethod
from typing import Generic, TypeVar
T = TypeVar("T")
class Plain:
    async def wait(self, *names, timeout=None, **more): ...
class Base(ABC, Generic[T]):
    @abstractmethod
    def left(self): ...
    @abstractmethod
    def also(self): ...
class Half(Base[int]):
    def also(self): ...
def starred(a, /, b): ...
""",
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    root = tmp_path_factory.mktemp("tree")
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return Tree(root)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("lib.near:", "module"),
        ("lib:near", "module"),
        ("lib:Soon", "class"),
        ("lib:made", "value"),
        ("lib.near:VALUE", "value"),
        ("lib.near:ALIAS", "class"),
        ("lib.near:other", "()"),
        ("lib.near:starred", "(a, b)"),
        ("lib.near:distant.Half", "class"),
        ("lib.near:Soon.__init__", "(self, a, *, b=(1, 2))"),
        ("lib.near:Soon.second", "value"),
        ("lib.near:Soon.limit", "value"),
        ("lib.near:Soon.size", "property"),
        ("lib.near:Soon.left", "(self)"),
        ("lib.near:Soon.wait", "(self, *names, timeout=None, **more)"),
        ("lib.gone:Soon|lib.near:Soon", "class"),
    ],
)
def test_it_finds(tree: Tree, path: str, text: str) -> None:
    found = tree.find(path)
    assert found is not None
    assert describe(found.node) == text


@pytest.mark.parametrize(
    "path", ["lib.gone:", "lib.near:Gone", "lib.near:Soon.gone", "lib:gone", "lib.a:B|lib.b:C"]
)
def test_it_does_not_find_what_is_not_there(tree: Tree, path: str) -> None:
    assert tree.find(path) is None


@pytest.mark.parametrize(
    ("path", "left"), [("lib.far:Base", {"left", "also"}), ("lib.far:Half", {"left"})]
)
def test_what_a_class_leaves_open(tree: Tree, path: str, left: set[str]) -> None:
    found = tree.find(path)
    assert found is not None
    assert tree.abstract(found) == left
