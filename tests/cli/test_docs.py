"""What a user can type is in the documentation."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer.main

from conserve.cli.main import app
from conserve.engine.settings import EngineSettings
from conserve.server.start.flags import flags

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)


def leaves(command: Any, path: str = "conserve") -> dict[str, Any]:
    """Every command that can be run, by its full name."""
    nested = getattr(command, "commands", None)
    if not nested:
        return {path: command}
    all_of_them: dict[str, Any] = {}
    for name, each in nested.items():
        all_of_them |= leaves(each, f"{path} {name}")
    return all_of_them


COMMANDS = leaves(typer.main.get_command(app))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_documented(name: str) -> None:
    assert name in TEXT


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_of_a_command_is_documented(name: str) -> None:
    command = COMMANDS[name]
    options = [
        option
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("--") and option != "--help"
    ]
    assert [option for option in options if f"`{option}" not in TEXT] == []


def test_every_flag_of_serve_is_in_the_table() -> None:
    table = (ROOT / "docs" / "serving.md").read_text()
    for flag in flags():
        assert re.search(rf"^\| `{flag.name}` \| ", table, re.MULTILINE), flag.name


def test_the_table_gives_the_defaults() -> None:
    table = (ROOT / "docs" / "serving.md").read_text()
    for flag in flags():
        if isinstance(flag.default, float):
            assert f"| `{flag.name}` | {flag.default:g} |" in table


def test_the_settings_without_a_flag_are_in_a_table_with_their_defaults() -> None:
    of_flags = {
        re.sub("^no_|_ms$", "", flag.name.removeprefix("--").replace("-", "_")) for flag in flags()
    }
    without = {
        field.name: field.default
        for field in fields(EngineSettings)
        if field.name != "policy" and field.name.removesuffix("_s") not in of_flags
        and field.name not in of_flags
    }  # fmt: skip
    page = (ROOT / "docs" / "serving.md").read_text()
    table = page.split("\nFiner settings of the engine")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `?([^|`]+)`? \|", table, re.MULTILINE)
    assert dict(rows) == {
        name: f"{default:g}" if isinstance(default, float) else str(default).lower()
        for name, default in without.items()
    }


def test_every_make_target_is_documented() -> None:
    targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = TEXT + (ROOT / "CONTRIBUTING.md").read_text()
    undocumented = [t for t in targets[0].split() if t != "help" and f"make {t}" not in text]
    assert undocumented == []


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.endswith(".png"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


OVERVIEW = (ROOT / "docs" / "design" / "overview.md").read_text()


def find(path: str) -> Path | None:
    """A path of the overview: below the package, or below the root."""
    return next((p for p in (ROOT / "src/conserve" / path, ROOT / path) if p.exists()), None)


def test_every_path_of_the_overview_is_there() -> None:
    named = set(re.findall(r"`((?:[\w-]+/)+[\w.-]*|[\w-]+/[\w.-]+\.py)`", OVERVIEW))
    assert len(named) > 50
    assert sorted(path for path in named if find(path) is None) == []


def test_what_the_overview_names_in_a_file_is_in_it() -> None:
    named = re.findall(r"`([\w/]+\.py)`, `(\w+)`", OVERVIEW)
    assert len(named) >= 5
    for path, symbol in named:
        file = find(path)
        assert file is not None, path
        assert re.search(rf"\b{symbol}\b", file.read_text()), (path, symbol)


def test_every_property_of_the_overview_has_tests_and_careless_variants() -> None:
    rows = re.findall(r"^\| (P\d) \| .+? \| (.+?) \| (.+?) \|$", OVERVIEW, re.MULTILINE)
    assert [name for name, _, _ in rows] == [f"P{number}" for number in range(8)]
    for name, held_by, careless in rows:
        assert "tests/" in held_by, name
        assert "`tests/" in careless or "the same file" in careless, name
