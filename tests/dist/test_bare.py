"""What works where the package is installed without extras, and what the rest says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.batch.builders import numbered
from tests.dist.bare import Bare
from tests.server.dashboard_world import Series, dashboard_app, served
from tests.sim.test_plan import MACHINE, PLAN

SHORT_PLAN = """
import conserve.sim.harvest
from conserve.workload import Window
conserve.sim.harvest.WINDOW = Window(lead_in_s=1, duration_s=5, drain_s=5)
from conserve.cli.main import main
main()
"""
ENGINE = ("vllm", "torch", "transformers", "asyncpg", "s3fs", "pytest")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of batches and of the live page, without an engine."""
    app = dashboard_app(tmp_path_factory.mktemp("served"), Series(), keys=[])
    with served(app) as (url, _):
        yield url


def said(bare: Bare, *words: str, cwd: Path) -> str:
    code, out, err = bare.run(*words, cwd=cwd)
    assert code == 0, out + err
    return out


def test_nothing_of_an_engine_is_there(bare: Bare, tmp_path: Path) -> None:
    look = f"import importlib.util as u; print([n for n in {ENGINE} if u.find_spec(n)])"
    code, out, _ = bare.run("-c", look, cwd=tmp_path, program="python")
    assert (code, out) == (0, "[]\n")


def test_help_and_version(bare: Bare, tmp_path: Path) -> None:
    assert "sim" in said(bare, "--help", cwd=tmp_path)
    assert said(bare, "--version", cwd=tmp_path).startswith("conserve 0.")


def test_a_scenario_is_simulated_by_name(bare: Bare, tmp_path: Path) -> None:
    words = ("sim", "run", "quick", "--seeds", "1", "--arms", "conserve", "--out", "out")
    assert "conserve" in said(bare, *words, cwd=tmp_path)
    assert (tmp_path / "out").is_dir()


def test_a_plan_is_made_and_drawn(bare: Bare, tmp_path: Path) -> None:
    (tmp_path / "machine.toml").write_text(MACHINE)
    (tmp_path / "plan.toml").write_text(PLAN.replace("MACHINE", str(tmp_path / "machine.toml")))
    words = ("-c", SHORT_PLAN, "plan", "plan.toml", "--plot", "plan.png")
    code, out, err = bare.run(*words, cwd=tmp_path, program="python")
    assert code == 0, err
    assert "nightly: 500 requests by 1.5 h" in out
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_planners_page_is_written(bare: Bare, tmp_path: Path) -> None:
    said(bare, "plan", "--page", "plan.html", cwd=tmp_path)
    assert "</html>" in (tmp_path / "plan.html").read_text()


def test_a_batch_is_sent_listed_and_cancelled(bare: Bare, url: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(numbered(3))
    at = ("--url", url, "--json")
    sent = json.loads(said(bare, "batch", "submit", "in.jsonl", *at, cwd=tmp_path))
    assert sent["object"] == "batch"
    listed = json.loads(said(bare, "batch", "list", *at, cwd=tmp_path))
    assert [batch["id"] for batch in listed] == [sent["id"]]
    ended = json.loads(said(bare, "batch", "cancel", sent["id"], *at, cwd=tmp_path))
    assert ended["status"] in ("cancelling", "cancelled")


def test_a_file_is_checked_without_a_server(bare: Bare, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(numbered(3))
    assert "3 requests, 0 errors" in said(bare, "batch", "validate", "in.jsonl", cwd=tmp_path)


def test_top_shows_a_server(bare: Bare, url: str, tmp_path: Path) -> None:
    assert json.loads(said(bare, "top", url, "--once", "--json", cwd=tmp_path))


def test_a_server_that_is_not_there_is_one_sentence(bare: Bare, tmp_path: Path) -> None:
    for words in (("batch", "list", "--url"), ("top",)):
        code, _, err = bare.run(*words, "http://127.0.0.1:9", cwd=tmp_path)
        assert code == 1
        assert "does not answer" in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    "words", [("serve", "--help"), ("demo",), ("bench", "run", "quick")]
)
def test_what_needs_the_engine_says_how_to_get_it(
    bare: Bare, tmp_path: Path, words: tuple[str, ...]
) -> None:
    code, out, err = bare.run(*words, cwd=tmp_path)
    assert (code, out) == (2, "")
    assert "needs vLLM, which is not installed: pip install 'conserve-llm[gpu]'" in err
    assert err.count("\n") == 1


def test_doctor_says_what_is_missing(bare: Bare, tmp_path: Path) -> None:
    words = ("doctor", "some/model", "--port", "0", "--data-dir", str(tmp_path), "--json")
    found = {each["name"]: each for each in json.loads(said(bare, *words, cwd=tmp_path))}
    assert found["vllm"]["level"] == "warning"
    assert "conserve-llm[gpu]" in found["vllm"]["fix"]
    assert found["model"]["text"] == "not looked at: there is no vLLM here"


def test_a_missing_driver_is_named_with_its_extra(bare: Bare, tmp_path: Path) -> None:
    make = "import time; from conserve.batch.settings import BatchSettings as S; "
    make += "from conserve.batch.stores import Stores; "
    make += "Stores(S(files_url='s3://bucket/folder'), time.time)"
    code, _, err = bare.run("-c", make, cwd=tmp_path, program="python")
    assert code == 1
    assert "pip install 'conserve-llm[s3]'" in err.splitlines()[-1]
