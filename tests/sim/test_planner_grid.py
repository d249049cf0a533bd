"""The grid that comes with us, the script that makes it, and the file that holds both."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from conserve.cli.main import app
from conserve.core.settings import CHAT_SLOWDOWN
from conserve.sim.planner.one_file import load_grid, one_file
from conserve.workload import Window
from tests.sim.planner_world import grid

ROOT = Path(__file__).parents[2]
MIB = 2**20


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "planner_grid", ROOT / "benchmarks" / "planner_grid.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "planner_grid", module)  # its dataclass looks there
    spec.loader.exec_module(module)
    return module


def places(found: dict[str, Any]) -> Iterator[tuple[list[float], dict[str, Any], int]]:
    """Chat's figures alone, the work that is beside them, and which place of it they are."""
    for machine in found["machines"]:
        assert len(machine["alone"]) == len(found["loads"]) * len(found["bursts"])
        assert machine["work"].keys() == found["work"].keys()
        for work in machine["work"].values():
            for place, alone in enumerate(machine["alone"]):
                yield alone, work, place


def check(found: dict[str, Any]) -> None:
    """Every stop of every slider has every figure that the page reads, and they can be true."""
    chat, harvest = found["chat_figures"], found["harvest_figures"]
    tps = [*chat, *harvest].index("offline_tps")
    for alone, work, place in places(found):
        assert len(alone) == len(chat)
        assert len(work["beside"][place]) == len(found["slowdowns"])
        # First come, first served may keep every chat waiting: then there is no latency of any.
        assert None not in [*alone, *work["first_come"][place][len(chat) :]]
        for figures in work["beside"][place]:
            assert None not in figures
        for figures in [work["first_come"][place], *work["beside"][place]]:
            assert len(figures) == len(chat) + len(harvest)
            assert 0 <= figures[tps] < 1.2 * work["dedicated"][1]


def test_the_grid_is_whole_and_small() -> None:
    found = load_grid()
    check(found)
    assert len(one_file()) < MIB
    assert CHAT_SLOWDOWN["balanced"] in found["slowdowns"]  # where the page begins


def test_the_grid_has_the_axes_of_its_script(script: ModuleType) -> None:
    found = load_grid()
    assert found["loads"] == list(script.LOADS)
    assert found["bursts"] == list(script.BURSTS)
    assert found["slowdowns"] == list(script.SLOWDOWNS)
    assert found["work"].keys() == script.WORK.keys()
    machines = [(m["gpu"], m["num_gpus"], m["model"]) for m in found["machines"]]
    assert machines == list(script.MACHINES)[: len(machines)]


def test_the_script_makes_what_the_page_reads(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One machine, one load, a few seconds; the second time nothing is simulated."""
    short = {
        "LOADS": (0.2,),
        "BURSTS": (1.0,),
        "SLOWDOWNS": (1.5, 0.0),
        "WORK": {"notes": (500, 0.1, 600, 20, 0.1, 30)},
        "CHATS": (200, 0.1, 300, 20, 0.1, 30),
        "WINDOW": Window(lead_in_s=2.0, duration_s=8.0, drain_s=2.0),
        "KEPT": tmp_path,
    }
    for name, value in short.items():
        monkeypatch.setattr(script, name, value)
    machines = script.MACHINES[:1]
    made = json.loads(json.dumps(script.grid(machines)))
    check(made)
    monkeypatch.setattr(script, "at_rate", None)
    assert json.loads(json.dumps(script.grid(machines))) == made


def test_a_grid_with_a_hole_is_noticed() -> None:
    found = grid()
    found["machines"][0]["work"]["stories"]["beside"][1][2][0] = None
    with pytest.raises(AssertionError):
        check(found)


def test_the_page_is_one_file_that_names_no_other() -> None:
    page = one_file(grid())
    assert re.findall(r"""(?:src|href)=["'](?!#|data:)[^"']*""", page) == []
    assert "import " not in page.partition('<script type="module">')[2]


def test_words_of_a_grid_end_no_script() -> None:
    found = grid() | {"made_by": "</script><script>alert(1)</script>"}
    page = one_file(found)
    assert page.count("</script>") == 2
    assert "<script>alert" not in page


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    out = tmp_path / "plan.html"
    done = CliRunner().invoke(app, ["plan", "--page", str(out)])
    assert done.exit_code == 0, done.output
    assert out.read_text() == one_file()
    assert f"open {out} in a browser" in done.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "FILE: name a plan, or --page out.html for a page that needs none"),
        (["--page", "no/such/folder/plan.html"], "no/such/folder/plan.html"),
    ],
)
def test_what_cannot_be_done_is_said(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["plan", *arguments])
    assert done.exit_code == 2
    assert said in done.output
    assert "Traceback" not in done.output
