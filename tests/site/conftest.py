"""The site, built once, and a browser to read it with."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.site.build import build
from tests.browser import browser as browser

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make docs` builds it: strictly."""
    return build(ROOT, tmp_path_factory.mktemp("site"))
