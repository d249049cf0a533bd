"""The simulator and vLLM's scheduler under our policy keep the same contract."""

from __future__ import annotations

import pytest

from tests.contract.clauses import CLAUSES, Clause
from tests.contract.situation import Play


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
def test_it_is_kept(play: Play, clause: Clause) -> None:
    clause(play)
