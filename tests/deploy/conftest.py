"""Prometheus, real, for the tests of what operators plug in."""

from __future__ import annotations

import pytest

from tests.debian import program


@pytest.fixture(scope="session")
def promtool() -> str:
    return program("prometheus", "usr/bin/promtool")


@pytest.fixture(scope="session")
def prometheus() -> str:
    return program("prometheus", "usr/bin/prometheus")
