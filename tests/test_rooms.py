"""The rooms point one way: import-linter's contracts hold, and would notice if they did not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

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
