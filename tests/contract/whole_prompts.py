"""The contract where chunked prefill is off."""

from __future__ import annotations

from dataclasses import replace

from tests.contract.clauses import SCARCE
from tests.contract.situation import Play, mixture

WHOLE = replace(SCARCE, chunked_prefill=False)


def prompts_that_cannot_be_cut_come_whole(play: Play) -> None:
    """In the plans and in the steps; also of those who yielded and begin anew."""
    for world in (WHOLE, replace(WHOLE, async_scheduling=True)):
        seen = play(world, mixture(3))
        assert seen.displaced
        for decision in seen.decisions:
            shown = decision.snapshot
            for view in (*shown.running, *shown.waiting_online, *shown.waiting_offline):
                left = view.num_tokens - view.num_computed_tokens
                assert decision.plan.grants.get(view.request_id, left) == left, view
        for ask in seen.asks.values():
            grants = [step.grants.get(ask.name, 0) for step in seen.steps if not step.stopped]
            assert next(filter(None, grants)) >= ask.num_prompt_tokens
