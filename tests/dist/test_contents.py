"""What is in the wheel and in the sdist."""

from __future__ import annotations

import ast
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dist.built import PACKAGE, ROOT, Built, package_files

MOST_SDIST_BYTES = 5_000_000


def test_the_wheel_is_the_package_and_nothing_else(built: Built) -> None:
    found = {name: text for name, text in built.wheel_files().items() if "dist-info/" not in name}
    assert found == package_files()


def test_the_wheel_holds_what_the_code_opens(built: Built) -> None:
    names = built.wheel_files().keys()
    opened = set(opened_folders())
    assert {"conserve/sim", "conserve/workload/scenarios", "conserve/batch/migrations"} <= opened
    for folder in opened:
        data = [
            str(path.relative_to(PACKAGE.parent))
            for path in (PACKAGE.parent / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        ]
        assert data
        assert set(data) <= names


def opened_folders() -> Iterator[str]:
    """Folders of the package that code names to read files of: `files("conserve.sim")`, with what
    is joined to it, and `Path(__file__).with_name("migrations")`."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.BinOp) and (package := _resource(node.left)):
                yield f"{package}/{ast.literal_eval(node.right)}"
            elif package := _resource(node):
                yield package
            elif name := _sibling(node):
                yield str((file.parent / name).relative_to(PACKAGE.parent))


def _resource(node: ast.expr | ast.AST) -> str:
    match node:
        case ast.Call(func=ast.Name(id="files"), args=[ast.Constant(value=str(package))]):
            return package.replace(".", "/")
    return ""


def _sibling(node: ast.AST) -> str:
    match node:
        case ast.Call(
            func=ast.Attribute(
                value=ast.Call(func=ast.Name(id="Path"), args=[ast.Name(id="__file__")]),
                attr="with_name",
            ),
            args=[ast.Constant(value=str(name))],
        ):
            return name
    return ""


def test_licences_are_in_the_wheel(built: Built) -> None:
    found = built.wheel_files()
    texts = [text for name, text in found.items() if "dist-info/licenses/" in name]
    assert sorted(texts) == sorted(
        [
            (ROOT / "LICENSE").read_bytes(),
            (PACKAGE / "server/dashboard/page/uplot-license.txt").read_bytes(),
        ]
    )


def test_the_sdist_builds_and_tests_itself(built: Built) -> None:
    """It lacks nothing but results that no test reads."""
    left_out = tracked(".") - built.sdist_files().keys()
    assert [name for name in left_out if not name.startswith("benchmarks/results/")] == []


def test_the_sdist_has_no_pictures_of_results_and_is_small(built: Built) -> None:
    files = built.sdist_files()
    results = [name for name in files if name.startswith("benchmarks/results/")]
    assert not [n for n in results if n.endswith((".png", ".html")) and "gpu-rehearsal" not in n]
    assert sum(files.values()) < 4 * MOST_SDIST_BYTES
    assert built.sdist.stat().st_size < MOST_SDIST_BYTES


def test_the_sdist_has_nothing_that_git_ignores(built: Built) -> None:
    made = {"PKG-INFO", "setup.cfg"}
    names = {n for n in built.sdist_files() if "egg-info/" not in n and n not in made}
    assert names <= tracked(".")


def tracked(folder: str) -> set[str]:
    """Files that git knows, or would if they were added."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("this is no checkout of git")
    command = [git, "ls-files", "--cached", "--others", "--exclude-standard", folder]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.splitlines() if Path(ROOT, name).is_file()}
