"""Decodes with drafts: what they take of a step, of blocks, and of chat's time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from conserve.core.blocks import lacking_blocks, promised_blocks
from conserve.core.invariants import check
from conserve.core.kv_groups import KVGroup, KVGroups
from conserve.core.latency import LatencyModel, StepShape
from conserve.core.policy import decide
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import RequestView, Snapshot
from conserve.metrics.chat_gaps import ChatGaps

MODEL = LatencyModel(fixed=0.01, per_token=1e-4, per_decode=1e-3, margin=0.0)
SETTINGS = PolicySettings()
WIDTH = 4


def decoding(name: str, *, online: bool = False) -> RequestView:
    return RequestView(name, online, 0.0, 104, 100, num_blocks=7, last_token_s=9.99)


def snapshot(*running: RequestView, offline: tuple[RequestView, ...] = (), **more: int) -> Snapshot:
    values: dict[str, Any] = {"max_step_tokens": 100, "num_free_blocks": 1000, **more}
    return Snapshot(
        10.0,
        running,
        (),
        offline,
        num_free_slots=16,
        block_size=16,
        decode_width=WIDTH,
        can_stop=True,
        **values,
    )


def test_what_drafting_takes_of_a_step_is_left_for_each_request() -> None:
    """vLLM would give the last ones less than planned, and an arrival behind them nothing."""
    running = [decoding(f"r{i}") for i in range(30)]
    waiting = RequestView("new", False, 0.0, 500)
    scene = snapshot(*running, offline=(waiting,), tokens_beside=1)
    plan = decide(scene, MODEL, SETTINGS)
    check(scene, plan, MODEL, SETTINGS)
    assert sum(num_tokens + 1 for num_tokens in plan.grants.values()) <= 100
    assert set(plan.grants.values()) == {WIDTH}
    assert len(plan.grants) == 20
    few = snapshot(*running[:10], offline=(waiting,), tokens_beside=1)
    assert decide(few, MODEL, SETTINGS).grants["new"] == 100 - 10 * 5 - 1


def test_blocks_that_a_draft_model_writes_to_are_needed_as_well() -> None:
    view = RequestView("new", False, 0.0, 32, num_lookahead_tokens=3)
    several = KVGroups((KVGroup(16), KVGroup(16)))
    assert [lacking_blocks(view, memory) for memory in (16, several)] == [3, 6]
    assert [promised_blocks([view], memory) for memory in (16, several)] == [3, 6]


@pytest.mark.parametrize(("num_free", "restores"), [(8, False), (9, True)])
def test_a_restore_leaves_the_blocks_of_its_first_step(num_free: int, restores: bool) -> None:
    """vLLM begins none without, and the plan would ask for it for ever."""
    view = RequestView("back", False, 0.0, 128, num_checkpointed_tokens=120)
    scene = Snapshot(
        10.0,
        [],
        [],
        [view],
        num_free_blocks=num_free,
        num_free_slots=16,
        block_size=16,
        max_step_tokens=100,
        restore_tokens_per_s=1e9,
        restore_blocks=1,
    )
    plan = decide(scene, MODEL, SETTINGS)
    assert bool(plan.restore) == restores
    assert bool(plan.grants) != restores, "then it computes"


def alone_s(model: LatencyModel, width: int) -> float:
    """What chat's gaps would be alone, by steps of one chat and of ten with a prompt beside."""
    gaps = ChatGaps()
    for num_chats, num_prompt_tokens in [(1, 0), (10, 200)] * 20:
        online = StepShape()
        for _ in range(num_chats):
            online.add_decode(width, 100)
        if num_prompt_tokens:
            online.add_prefill(num_prompt_tokens, 0)
        seconds = model.predict_s(online)
        gaps.fade(1.0, seconds)
        gaps.add(seconds, online, model, num_chats)
    return gaps.alone_s(model)


def test_chat_waits_for_messages_and_not_for_tokens() -> None:
    """A decode of several tokens is one that takes as much longer."""
    longer = replace(MODEL, per_decode=MODEL.per_decode + (WIDTH - 1) * MODEL.per_token)
    assert alone_s(MODEL, WIDTH) == pytest.approx(alone_s(longer, 1))
