"""Which tests of `make test` may run beside which."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import MADE_ONCE, TwoProcesses

ROOT = Path(__file__).resolve().parents[1]


def scopes(folder: str) -> list[str]:
    """Of each of the folder's modules: those of one scope run in one process."""
    given: Any = SimpleNamespace(config=SimpleNamespace(rootpath=ROOT))
    modules = sorted((ROOT / folder).glob("test_*.py"))
    return [
        TwoProcesses._split_scope(given, f"{folder}/{module.name}::test_a[b]") for module in modules
    ]


@pytest.mark.parametrize("folder", MADE_ONCE)
def test_what_is_made_once_is_made_in_one_process(folder: str) -> None:
    assert (ROOT / folder / "conftest.py").is_file()
    assert len(scopes(folder)) > 1
    assert set(scopes(folder)) == {folder}


def test_real_servers_run_in_one_process_and_other_modules_in_any() -> None:
    assert set(scopes("tests/examples")) >= {"servers", "tests/examples/test_readme.py"}
    found = scopes("tests/metrics")
    assert len(set(found)) == len(found) > 1
