"""The page on the policy documents every setting, with its default."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from conserve.core.plan import Mode
from conserve.core.settings import PolicySettings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "design" / "policy.md"


def documented_settings(page: str) -> dict[str, str]:
    """setting -> default, from the table below the heading Settings."""
    table = page.split("\n## Settings\n", 1)[1].split("\n## ", 1)[0]
    return dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", table, flags=re.MULTILINE))


def test_every_setting_is_documented_with_its_default() -> None:
    defaults = {field.name: str(field.default) for field in fields(PolicySettings)}
    assert documented_settings(PAGE.read_text()) == defaults
    assert PolicySettings.names() == list(defaults)


@pytest.mark.parametrize("name", PolicySettings.names())
def test_a_missing_row_would_be_noticed(name: str) -> None:
    rows = [line for line in PAGE.read_text().splitlines() if not line.startswith(f"| `{name}`")]
    assert name not in documented_settings("\n".join(rows))


@pytest.mark.parametrize("mode", Mode)
def test_every_mode_has_a_row(mode: Mode) -> None:
    assert f"| `{mode}` |" in PAGE.read_text()
