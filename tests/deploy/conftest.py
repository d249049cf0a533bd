"""Prometheus, real, for the tests of what operators plug in."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from debian import program


@pytest.fixture(scope="session")
def promtool() -> str:
    return program("prometheus", "usr/bin/promtool")


@pytest.fixture(scope="session")
def prometheus() -> str:
    return program("prometheus", "usr/bin/prometheus")
