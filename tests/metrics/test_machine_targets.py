"""Targets from what a machine does alone: kept by it, said with their reason, and round."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve.core.latency import LatencyModel, StepShape
from conserve.core.snapshot import Targets
from conserve.metrics.machine_targets import (
    CHAT_TOKENS,
    LEAST_TBT_S,
    LEAST_TTFT_S,
    NUM_CHATS,
    choose_targets,
    rounded_up,
)

GPU = LatencyModel(0.006, 2e-5, per_context=1e-8, knee=200.0, margin=0.05)
CPU = LatencyModel(0.012, 5e-4, per_decode=1e-3, per_context=5e-7, margin=0.1)
models = st.builds(
    LatencyModel,
    st.floats(1e-4, 0.5),
    st.floats(1e-6, 0.02),
    per_decode=st.floats(0, 1e-3),
    per_context=st.floats(0, 1e-6),
    knee=st.floats(0, 500),
    margin=st.floats(0, 0.5),
)


def test_a_quick_machines_are_what_people_notice() -> None:
    chosen = choose_targets(GPU)
    assert chosen.targets == Targets(LEAST_TTFT_S, LEAST_TBT_S)
    assert "faster than people read" in chosen.tbt_reason
    assert "too short to be noticed" in chosen.ttft_reason


def test_a_slow_machines_are_what_it_does_alone() -> None:
    chosen = choose_targets(CPU)
    assert chosen.targets == Targets(ttft_s=1.5, tbt_s=0.2)
    assert chosen.tbt_reason == "from the machine: 4 steps of 16 chats alone, of 48.6 ms each"
    assert chosen.ttft_reason == (
        "from the machine: 2 prompts of 1,024 tokens alone, of 576 ms each, "
        "and one gap between tokens"
    )


def test_what_was_not_measured_makes_no_target() -> None:
    """A profile of prompts of 16 tokens, on a machine that others kept busy: by its attention one
    of 1,024 would take seven minutes."""
    cut_off = LatencyModel(0.02, 1e-3, per_pair=8.4e-4, per_decode=1e-3, margin=0.24)
    assert cut_off.predict_prefill_s(CHAT_TOKENS) > 400
    assert choose_targets(cut_off).targets.ttft_s < 30


@given(models)
def test_chat_alone_keeps_them_with_room_for_offline_work(model: LatencyModel) -> None:
    targets = choose_targets(model).targets
    factor = 1 + model.margin
    chats = StepShape(NUM_CHATS, 0.0, NUM_CHATS, NUM_CHATS * CHAT_TOKENS)
    # Half of a gap is the most that a step which can be stopped fills.
    assert targets.tbt_s >= 4 * model.predict_s(chats) * factor
    assert targets.ttft_s >= 2 * model.predict_prefill_s(CHAT_TOKENS) * factor + targets.tbt_s
    assert targets.tbt_s >= LEAST_TBT_S
    assert targets.ttft_s >= LEAST_TTFT_S


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ({"ttft_s": 9.0}, Targets(9.0, 0.2)),
        ({"tbt_s": 0.6}, Targets(2.0, 0.6)),
        ({"ttft_s": 1.0, "tbt_s": 0.1, "offline_floor": 0.2}, Targets(1.0, 0.1, 0.2)),
    ],
)
def test_what_is_named_stands(named: dict[str, float], found: Targets) -> None:
    chosen = choose_targets(CPU, **named)
    assert chosen.targets == found
    assert (chosen.ttft_reason == "as asked for") == ("ttft_s" in named)
    assert (chosen.tbt_reason == "as asked for") == ("tbt_s" in named)


def test_an_unmeasured_machine_has_the_defaults() -> None:
    chosen = choose_targets(None)
    assert chosen.targets == Targets()
    assert chosen.ttft_reason == "by default: the machine has not been measured"


@given(st.floats(1e-3, 1e3))
def test_rounding_goes_up_and_not_far(seconds: float) -> None:
    found = rounded_up(seconds)
    assert seconds * (1 - 1e-9) <= found <= 1.5 * seconds + 1e-6
    assert rounded_up(found) == found


@pytest.mark.parametrize(
    ("seconds", "found"), [(0.0301, 0.04), (0.9, 1.0), (1.01, 1.25), (12, 12.5)]
)
def test_round_targets(seconds: float, found: float) -> None:
    assert rounded_up(seconds) == found
