"""The reference has all that the code has: it is made from it, and nothing is lost on the way."""

from __future__ import annotations

from dataclasses import fields
from html import unescape
from pathlib import Path
from re import sub

import pytest
import typer.main
from fastapi import FastAPI
from pydantic import BaseModel

from conserve.batch import wire
from conserve.batch.settings import BatchSettings
from conserve.cli.main import app
from conserve.core.settings import PolicySettings
from conserve.engine.series import METRICS
from conserve.engine.settings import EngineSettings
from conserve.server.batches.metrics import SERIES
from conserve.server.batches.routes import attach_batches
from conserve.server.start.flags import flags
from scripts.site.reference import environment
from scripts.site.reference.commands import leaves


def words(site: Path, name: str) -> str:
    """A page as it is read: without tags."""
    html = (site / "reference" / f"{name}.html").read_text()
    return unescape(sub(r"<[^>]+>", "", html[html.index("<article") : html.index("</article>")]))


def test_flags_with_their_help(site: Path) -> None:
    page = words(site, "flags")
    for flag in flags():
        assert flag.name in page
        assert flag.help.split(". ")[0][:60] in page


def test_commands_with_every_option(site: Path) -> None:
    page = words(site, "commands")
    for name, command in leaves(typer.main.get_command(app)):
        assert name in page
        hidden = [p for p in command.params if getattr(p, "hidden", False)]
        for parameter in set(command.params) - set(hidden):
            assert all(option in page for option in parameter.opts if option.startswith("--"))


def test_settings(site: Path) -> None:
    page = words(site, "settings")
    named = [field.name for cls in (EngineSettings, PolicySettings) for field in fields(cls)]
    assert [name for name in [*named, *BatchSettings.model_fields] if name not in page] == []


def test_series(site: Path) -> None:
    page = words(site, "series")
    named = [*(metric.name for metric in METRICS), *(one.name for one in SERIES), "flex_refused"]
    assert [name for name in named if f"conserve:{name}" not in page] == []


def test_routes_and_fields(site: Path) -> None:
    page = words(site, "api")
    routes = FastAPI()
    attach_batches(routes, None)  # type: ignore[arg-type]  # nothing is asked of it
    assert [path for path in routes.openapi()["paths"] if path not in page] == []
    shown: list[type[BaseModel]] = [wire.BatchCreate, wire.BatchObject, wire.UsageDay]
    shown += [wire.FileObject, wire.ErrorBody]
    assert [name for cls in shown for name in cls.model_fields if name not in page] == []


def test_variables(site: Path) -> None:
    page = words(site, "environment")
    assert [name for name in environment.read_by_name() if name not in page] == []
    assert "CONSERVE_BATCH_DATA_DIR" in page
    assert "CONSERVE_URL" in page


def test_a_variable_that_nobody_describes_ends_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(environment.READ, "XDG_DATA_HOME")
    with pytest.raises(LookupError, match="XDG_DATA_HOME: read by the code"):
        environment.page()
