"""One version, said by everything that says one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml
from packaging.metadata import Metadata
from packaging.version import Version
from typer.testing import CliRunner

from conserve import __version__
from conserve.cli.main import app
from tests.dist.built import ROOT, Built
from tests.server.dashboard_world import Series, dashboard_app, served

CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
SECTION = re.compile(r"^## (\S+)(?: - (\d{4}-\d\d-\d\d))?$", re.MULTILINE)
LABEL = re.compile(r"org\.opencontainers\.image\.version=\"?([^\s\"]+)")


def test_it_is_a_version() -> None:
    assert str(Version(__version__)) == __version__


def test_wheel_and_sdist(built: Built) -> None:
    assert str(Metadata.from_email(built.metadata()).version) == __version__
    assert built.wheel.name.startswith(f"conserve_llm-{__version__}-py3-none-any")
    assert built.sdist.name == f"conserve_llm-{__version__}.tar.gz"


def test_the_command() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"conserve {__version__}\n"


def test_the_chart() -> None:
    chart = yaml.safe_load((ROOT / "deploy/kubernetes/conserve/Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_images(kind: str) -> None:
    text = (ROOT / f"deploy/container/Dockerfile.{kind}").read_text()
    assert LABEL.findall(text) == [__version__]


def test_openapi(tmp_path: Path) -> None:
    with served(dashboard_app(tmp_path, Series(), keys=[])) as (url, _):
        told = httpx.get(f"{url}/openapi.json").json()["info"]
    assert told == {"title": "ConServe", "version": __version__}


def test_the_newest_release_of_the_changelog() -> None:
    """Above it there may be what is not released yet."""
    sections = [found for found in SECTION.findall(CHANGELOG) if found[0] != "Unreleased"]
    assert sections[0][0] == __version__
    assert all(day for _, day in sections)
    versions = [Version(name) for name, _ in sections]
    assert versions == sorted(versions, reverse=True)


def test_nothing_is_imported_to_build_it() -> None:
    """setuptools reads the version from the text; an import would need every dependency."""
    code = "import sys, conserve; print(len([m for m in sys.modules if m.startswith('conserve')]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
