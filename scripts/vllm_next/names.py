"""Attributes that our source reads of vLLM's objects without a door to their class.

The scheduler, a request, a model runner come to us as arguments. What is read of them is known by
its name alone: one that our source does not define itself, and that vLLM defines where such
objects come from.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from scripts.vllm_next.tree import Function, own_members

ROOMS = ("engine", "server")
WATCHED = (
    "v1/core/**/*.py", "v1/worker/*.py", "v1/worker/gpu/*.py", "v1/engine/*.py", "v1/request.py",
    "v1/outputs.py", "v1/kv_cache_interface.py", "v1/metrics/*.py", "config/*.py",
    "distributed/kv_transfer/kv_connector/v1/*.py", "sampling_params.py", "pooling_params.py",
    "lora/request.py", "multimodal/inputs.py", "multimodal/cache/*.py",
)  # fmt: skip
"""Where the objects are from that come to us, below the folder `vllm`."""
PLAIN = {name for kind in (dict, list, set, str, bytes, Path) for name in dir(kind)}

Places = dict[str, set[str]]
"""Name -> the files that define it."""


def read(package: Path) -> dict[str, str]:
    """Attributes read in the rooms that meet vLLM's objects -> file:line of the first."""
    ours: set[object] = set()
    found: dict[str, str] = {}
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        ours |= set(_defined(tree))
        file = path.relative_to(package)
        if file.name == "door.py":  # what these name is compared by its place
            ours |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
        if file.parts[0] in ROOMS:
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute):
                    found.setdefault(node.attr, f"{file.as_posix()}:{node.lineno}")
    return {name: where for name, where in found.items() if name not in ours and name not in PLAIN}


def places(vllm: Path) -> Places:
    """Everything that the watched files of vLLM define."""
    found: Places = {}
    for pattern in WATCHED:
        for path in sorted(vllm.glob(pattern)):
            for name in _defined(ast.parse(path.read_text(encoding="utf-8"))):
                found.setdefault(name, set()).add(path.relative_to(vllm).as_posix())
    return found


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, Function | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from own_members(node)


def gone(used: dict[str, str], old: Places, new: Places) -> Iterator[str]:
    """A line for each name that is defined in none of the places that it had."""
    for name, where in sorted(used.items()):
        had = old.get(name, set())
        if had and not had & new.get(name, set()):
            moved = f"; it is in {_some(new[name])}" if name in new else ""
            yield f"gone: .{name} of {_some(had)}{moved} (read in {where})"


def _some(files: set[str]) -> str:
    return ", ".join(sorted(files)[:3])
