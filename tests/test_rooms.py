"""The rooms point one way: import-linter's contracts hold, and would notice if they did not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[1]
CLI = "import sys; from importlinter.cli import lint_imports_command as c; sys.exit(c())"


def lint_imports(package_parent: Path) -> subprocess.CompletedProcess[str]:
    """Check the project's contracts against the package `conserve` below `package_parent`."""
    config = str(ROOT / "pyproject.toml")
    return subprocess.run(
        [sys.executable, "-c", CLI, "--config", config, "--no-cache"],
        # import-linter puts its working directory first on the path.
        cwd=package_parent,
        env={**os.environ, "PYTHONPATH": str(package_parent)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_contracts_hold() -> None:
    result = lint_imports(ROOT / "src")
    assert result.returncode == 0, result.stdout + result.stderr
    assert ", 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("room", "line", "importer", "imported"),
    [
        ("core", "import time", "conserve.core.intruder", "time"),
        ("core", "import vllm", "conserve.core.intruder", "vllm"),
        ("core", "import conserve.sim", "conserve.core.intruder", "conserve.sim"),
        ("sim", "import conserve.engine", "conserve.sim.intruder", "conserve.engine"),
        ("metrics", "import conserve.workload", "conserve.metrics.intruder", "conserve.workload"),
    ],
)
def test_a_forbidden_import_is_seen(
    tmp_path: Path, room: str, line: str, importer: str, imported: str
) -> None:
    shutil.copytree(
        ROOT / "src" / "conserve",
        tmp_path / "conserve",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    (tmp_path / "conserve" / room / "intruder.py").write_text(line + "\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"{importer} -> {imported}" in result.stdout


def circle(package: str) -> list[str]:
    """Modules that import each other, imports in functions and for type checkers included; none
    where there is no such circle."""
    graph = grimp.build_graph(package, cache_dir=None)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other() -> None:
    assert circle("conserve") == []


def test_a_circle_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: also where one of the imports is in a function."""
    package = tmp_path / "roundabout"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "left.py").write_text("from roundabout import right\n")
    (package / "right.py").write_text("def later():\n    from roundabout import left\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert set(circle("roundabout")) == {"roundabout.left", "roundabout.right"}
