"""docs/models.md says what came of the matrix, and the matrix has played every family."""

from __future__ import annotations

import pytest

from tests.models.page import PAGE, table, with_table
from tests.models.registry import FAMILIES
from tests.models.results import expected_row, read

pytestmark = pytest.mark.engine


def test_the_page_is_made_of_the_results() -> None:
    page = PAGE.read_text()
    assert with_table(page, read()) == page, "run `make matrix`, or python -m tests.models.page"


def test_a_result_that_the_page_does_not_show_is_noticed() -> None:
    results = read()
    shown = table(results)
    next(iter(results["families"].values()))["num_groups"] = 99
    assert table(results) != shown


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_played(family: str) -> None:
    rows = read()["families"]
    assert family in rows, "it has not played yet: run `make matrix`"
    assert rows[family] == expected_row(FAMILIES[family])


def test_results_are_of_families_that_there_are() -> None:
    assert set(read()["families"]) <= set(FAMILIES)
