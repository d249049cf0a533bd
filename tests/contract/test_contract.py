"""The simulator and vLLM's scheduler under our policy keep the same contract."""

from __future__ import annotations

import pytest

from tests.contract.clauses import CLAUSES, Clause
from tests.contract.situation import Play
from tests.contract.whole_prompts import prompts_that_cannot_be_cut_come_whole

EVERY_CLAUSE = (*CLAUSES, prompts_that_cannot_be_cut_come_whole)


@pytest.mark.parametrize("clause", EVERY_CLAUSE, ids=lambda clause: clause.__name__)
def test_it_is_kept(play: Play, clause: Clause) -> None:
    clause(play)
