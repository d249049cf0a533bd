"""`pip install .` alone is enough: no command of the simulator needs vLLM, torch or a web server.

What that install brings is in pyproject's dependencies; here everything else is made impossible
to import.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

from tests.sim.test_plan import MACHINE, PLAN
from tests.sim.test_study import SCENARIO

ROOT = Path(__file__).parents[2]
FORBIDDEN = ("vllm", "torch", "transformers", "fastapi", "starlette", "uvicorn")
"""fastapi is installed with the package, for `conserve serve`; a simulation has no use for it."""

WITHOUT = f"""
import sys
for name in {FORBIDDEN}:
    sys.modules[name] = None
"""
COMMAND = (
    WITHOUT
    + """
import conserve.sim.harvest
from conserve.workload import Window
conserve.sim.harvest.WINDOW = Window(lead_in_s=1, duration_s=5, drain_s=5)
from conserve.cli.main import main
main()
"""
)


def _run(code: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, cwd=cwd
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny.toml").write_text(SCENARIO)
    (tmp_path / "machine.toml").write_text(MACHINE)
    (tmp_path / "plan.toml").write_text(PLAN.replace("MACHINE", str(tmp_path / "machine.toml")))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sim", "list"], "llama-3.1-8b"),
        (["sim", "run", "tiny.toml", "--seeds", "1", "--out", "out", "--chrome-trace"], "conserve"),
        (["plan", "plan.toml", "--plot", "plan.png"], "harvest"),
    ],
    ids=["list", "run", "plan"],
)
def test_a_command_works(folder: Path, words: list[str], said: str) -> None:
    done = _run(COMMAND, *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_the_paper_page_is_made_without_them(tmp_path: Path) -> None:
    script = WITHOUT + "import runpy, sys; sys.path.insert(0, sys.argv[1]); "
    script += "sys.argv[1:] = ['--help']; runpy.run_path('sim_paper.py', run_name='__main__')"
    done = _run(script, ".", cwd=ROOT / "benchmarks")
    assert done.returncode == 0, done.stderr
    assert "--trace" in done.stdout


def test_the_guard_can_fail(tmp_path: Path) -> None:
    done = _run(WITHOUT + "import fastapi", cwd=tmp_path)
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr


def test_the_package_declares_no_engine() -> None:
    always = [line for line in requires("conserve-llm") or () if "extra ==" not in line]
    assert any(line.startswith("numpy") for line in always)
    assert not any(line.startswith(("vllm", "torch", "transformers")) for line in always)


def test_an_unknown_scenario_is_named_outside_the_repository_too(tmp_path: Path) -> None:
    done = _run(COMMAND, "sim", "run", "brust", cwd=tmp_path)
    assert done.returncode == 2
    assert "burst" in done.stderr
