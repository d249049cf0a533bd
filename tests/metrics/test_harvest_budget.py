"""How much more offline work an engine says it would take."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from conserve.core.latency import LatencyModel
from conserve.core.policy import decide
from conserve.core.settings import CHAT_SLOWDOWN
from conserve.core.snapshot import RequestView, Snapshot
from conserve.metrics.harvest_budget import MEMORY_S, SAMPLE_S, HarvestBudget, step_budget

MODEL = LatencyModel(fixed=0.02, per_token=1e-3, margin=0.0)
NUM_BLOCKS, NUM_SLOTS = 1000, 64


def decoding(name: str, *, online: bool, num_tokens: int = 100) -> RequestView:
    return RequestView(
        name, online, 0.0, num_tokens, num_tokens - 1, num_blocks=7, last_token_s=10.0
    )


def waiting(name: str, num_tokens: int = 100) -> RequestView:
    return RequestView(name, False, 0.0, num_tokens)


IDLE = Snapshot(
    now_s=10.0,
    running=(),
    waiting_online=(),
    waiting_offline=(),
    num_free_blocks=NUM_BLOCKS,
    num_free_slots=NUM_SLOTS,
    block_size=16,
    max_step_tokens=1024,
    can_stop=True,
)


def budget(snapshot: Snapshot, num_waiting: int = 0) -> float:
    """Of the step that the policy decides for it."""
    plan = decide(snapshot, MODEL)
    return step_budget(
        snapshot,
        plan,
        MODEL,
        num_waiting_offline=num_waiting,
        num_blocks=NUM_BLOCKS,
        num_slots=NUM_SLOTS,
    )


def test_an_idle_engine_takes_all() -> None:
    assert budget(IDLE) == 1


def test_beside_chat_it_takes_what_chat_leaves_of_a_step() -> None:
    """By default that is what the slowdown of chat allows beyond its own part of a step."""
    left = 1 - 1 / CHAT_SLOWDOWN["balanced"]
    chats = [decoding(f"on {i}", online=True) for i in range(4)]
    snapshot = replace(IDLE, running=chats, online_residency=1.0)
    assert budget(snapshot) == pytest.approx(left)
    filled = [decoding(f"off {i}", online=False) for i in range(6)]
    assert 0 < budget(replace(snapshot, running=[*chats, *filled])) < left


def test_a_request_that_is_given_less_than_it_could_compute_closes_it() -> None:
    prompt = RequestView("off", False, 0.0, 5000, num_blocks=400)
    assert budget(replace(IDLE, running=[prompt])) == 0
    assert budget(replace(IDLE, running=[replace(prompt, num_computed_tokens=4900)])) > 0


def test_memory_that_is_spoken_for_is_no_budget() -> None:
    assert budget(replace(IDLE, num_free_blocks=300)) == pytest.approx(0.3)
    remembered = replace(IDLE, num_free_blocks=300, num_remembered_blocks=100)
    assert budget(remembered) == pytest.approx(0.2)
    # 160 tokens are ten blocks; those behind the head take as much each.
    queued = replace(IDLE, num_free_blocks=300, waiting_offline=[waiting("off", 160)])
    assert budget(queued, num_waiting=10) == pytest.approx(0.2)
    assert budget(queued, num_waiting=40) == 0


def test_slots_that_are_spoken_for_are_no_budget() -> None:
    assert budget(replace(IDLE, num_free_slots=16)) == pytest.approx(0.25)
    queued = replace(IDLE, num_free_slots=16, waiting_offline=[waiting("off", 16)])
    assert budget(queued, num_waiting=12) == pytest.approx(4 / 64)


def test_steps_of_late_count_most() -> None:
    mean = HarvestBudget()
    assert mean.wants(5.0)
    mean.showed(5.0, 0.0)
    assert mean.value == 1, "the step has only begun"
    assert not mean.wants(5.0 + SAMPLE_S / 2)
    mean.showed(5.0 + MEMORY_S, 0.5)
    assert mean.value == pytest.approx(math.exp(-1))
    mean.showed(5.0 + 50 * MEMORY_S, 0.0)
    assert mean.value == pytest.approx(0.5)
    mean.idle()
    assert mean.value == 1
