"""`conserve demo` with bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from conserve.cli.main import app


@pytest.mark.parametrize("option", ["--alone-s", "--together-s"])
def test_a_period_of_no_time(option: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["demo", option, "0", "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert done.stderr.startswith("conserve demo: ")
    assert "must be above 0 seconds" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache" / "conserve" / "SmolLM2-135M-Instruct"
    cache.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "file" / "out")])
    assert done.exit_code == 2
    assert done.stderr.startswith("conserve demo: ")
    assert "file" in done.stderr
