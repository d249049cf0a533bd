"""The time to a first token in parts: each by itself, and together all of it."""

from __future__ import annotations

import math
from collections.abc import Collection
from random import Random

import pytest

from conserve.core.latency import LatencyModel, StepShape
from conserve.core.plan import Mode
from conserve.metrics.first_tokens import (
    EndedStep,
    FirstTokens,
    Part,
    Parts,
    kind_of,
    online_share,
)


def step(
    decided_s: float,
    ended_s: float,
    kind: Part = Part.UNSTOPPABLE_STEP,
    holds: Collection[str] = (),
    *,
    share: float = 1.0,
    asked_s: float = math.inf,
) -> EndedStep:
    return EndedStep(decided_s, ended_s, kind, dict.fromkeys(holds, 1).keys(), share, asked_s)


def parts_of(
    *steps: EndedStep, arrival_s: float = 0.0, known_s: float | None = None, first_s: float
) -> Parts:
    """Of one request "a", which is told of as soon as it is known."""
    tokens = FirstTokens()
    known_s = arrival_s if known_s is None else known_s
    told = False
    for one in steps:
        if not told and one.ended_s > known_s:
            tokens.arrived("a", arrival_s, known_s)
            told = True
        tokens.ended(one)
    return tokens.first_token("a", first_s)


def near(wanted: dict[Part, float]) -> dict[Part, object]:
    return {part: pytest.approx(seconds) for part, seconds in wanted.items()}


def test_an_idle_engine() -> None:
    own = step(1.0, 1.3, Part.ONLINE_STEP, "a")
    assert parts_of(own, arrival_s=1.0, first_s=1.3) == near({Part.IDLE: 0.0, Part.PREFILL: 0.3})


@pytest.mark.parametrize(
    "kind", [Part.ONLINE_STEP, Part.PREFILL_STEP, Part.UNSTOPPABLE_STEP, Part.STOPPABLE_STEP]
)
def test_the_step_that_ran_when_it_came(kind: Part) -> None:
    steps = (step(0.0, 0.5, kind), step(0.5, 0.8, holds="a"))
    wanted = near({kind: 0.3, Part.PREFILL: 0.3})
    assert parts_of(*steps, arrival_s=0.2, first_s=0.8) == wanted


def test_a_stop_is_counted_from_the_word_on() -> None:
    def with_word_at(asked_s: float) -> Parts:
        stopped = step(0.0, 0.5, Part.STOPPABLE_STEP, asked_s=asked_s)
        return parts_of(stopped, step(0.5, 0.8, holds="a"), arrival_s=0.2, first_s=0.8)

    assert with_word_at(0.2) == near({Part.STOP: 0.3, Part.PREFILL: 0.3})
    assert with_word_at(0.4) == near(
        {Part.STOPPABLE_STEP: 0.2, Part.STOP: 0.1, Part.PREFILL: 0.3}
    ), "when it had outrun its prediction"
    assert with_word_at(0.1) == near({Part.STOP: 0.3, Part.PREFILL: 0.3}), "for somebody before"


def test_steps_of_others_and_nobodys() -> None:
    steps = (
        step(0.0, 0.5, Part.ONLINE_STEP),
        step(0.6, 0.9, holds="b"),
        step(0.9, 1.0, holds="ab"),
        step(1.0, 1.2, holds="b"),
        step(1.2, 1.4, holds="ab"),
    )
    assert parts_of(*steps, arrival_s=0.4, first_s=1.45) == near(
        {Part.ONLINE_STEP: 0.1, Part.QUEUE: 0.5, Part.PREFILL: 0.3, Part.BETWEEN: 0.15}
    )


def test_what_offline_tokens_add() -> None:
    own = step(0.0, 0.4, holds="a", share=0.75)
    wanted = near({Part.IDLE: 0.0, Part.PREFILL: 0.3, Part.OFFLINE: 0.1})
    assert parts_of(own, first_s=0.4) == wanted


def test_a_step_that_was_decided_ahead_is_waited_for_too() -> None:
    """Under async scheduling: the second was decided when the first began."""
    steps = (
        step(0.0, 0.5, Part.UNSTOPPABLE_STEP),
        step(0.1, 0.7, Part.PREFILL_STEP),
        step(0.5, 0.8, holds="a"),
    )
    wanted = near({Part.UNSTOPPABLE_STEP: 0.2, Part.PREFILL_STEP: 0.2, Part.PREFILL: 0.1})
    assert parts_of(*steps, arrival_s=0.3, first_s=0.8) == wanted


def test_what_ended_before_the_scheduler_learned_of_it() -> None:
    """It came at 0.1 and is known from 0.65 on: two steps are over, the third runs."""
    steps = (
        step(0.0, 0.3, Part.ONLINE_STEP),
        step(0.3, 0.6, Part.STOPPABLE_STEP),
        step(0.6, 0.7, Part.UNSTOPPABLE_STEP),
        step(0.7, 0.9, holds="a"),
    )
    assert parts_of(*steps, arrival_s=0.1, known_s=0.65, first_s=0.9) == near(
        {
            Part.ONLINE_STEP: 0.2,
            Part.STOPPABLE_STEP: 0.3,
            Part.UNSTOPPABLE_STEP: 0.1,
            Part.PREFILL: 0.2,
        }
    )


def test_only_who_waits_for_a_first_token_gets_parts() -> None:
    tokens = FirstTokens()
    assert tokens.first_token("nobody", 1.0) == {}
    tokens.arrived("a", 0.0, 0.0)
    tokens.ended(step(0.0, 0.1, holds="a"))
    assert tokens.first_token("a", 0.1)
    assert tokens.first_token("a", 0.2) == {}


def test_those_who_ended_without_one_are_forgotten() -> None:
    tokens = FirstTokens()
    for i in range(1000):
        tokens.arrived(f"{i}", 0.0, 0.0)
        tokens.ended(step(0.0, 0.1))
        tokens.drop_finished({"0": None})
    assert len(tokens._waits) < 100
    assert tokens._unsettled == []
    assert tokens.first_token("0", 0.1), "still there"


@pytest.mark.parametrize("seed", range(20))
def test_the_parts_are_all_of_it(seed: int) -> None:
    """Random arrivals, and steps that hold some of those who wait, one in flight or two."""
    chance, tokens, ahead_s = Random(seed), FirstTokens(), 0.03 * (seed % 2)
    now_s, num_told = 0.0, 0
    waiting: dict[str, float] = {}
    """request -> when it came."""
    known: dict[str, float] = {}
    for number in range(300):
        decided_s, ended_s = max(0.0, now_s - ahead_s), now_s + chance.uniform(0.0, 0.1)
        names = [n for n in waiting if known[n] <= decided_s and chance.random() < 0.5]
        for i in range(chance.randrange(3)):
            name, arrival_s = f"{number}.{i}", chance.uniform(now_s, ended_s)
            waiting[name], known[name] = arrival_s, chance.choice([arrival_s, ended_s])
            tokens.arrived(name, arrival_s, known[name])
        kind = chance.choice([Part.ONLINE_STEP, Part.STOPPABLE_STEP, Part.PREFILL_STEP])
        asked_s = chance.choice([math.inf, chance.uniform(decided_s, ended_s)])
        share = chance.random()
        tokens.ended(step(decided_s, ended_s, kind, names, share=share, asked_s=asked_s))
        now_s = ended_s + chance.choice([0.0, 0.01])
        for name in [name for name in names if chance.random() < 0.7]:
            parts = tokens.first_token(name, now_s)
            assert all(seconds >= 0 for seconds in parts.values())
            assert sum(parts.values()) == pytest.approx(now_s - waiting.pop(name), abs=1e-5)
            num_told += 1
    assert num_told > 200


def test_what_a_step_is_called() -> None:
    def kind(mode: Mode, online: int, offline: int, *, stoppable: bool = False) -> Part:
        return kind_of(mode, online, offline, stoppable=stoppable)

    assert kind(Mode.ONLINE_PREFILL, 9, 0) is Part.ONLINE_STEP
    assert kind(Mode.ONLINE_DECODE, 9, 0) is Part.ONLINE_STEP
    assert kind(Mode.ONLINE_PREFILL, 9, 9) is Part.PREFILL_STEP
    assert kind(Mode.ONLINE_PREFILL, 0, 9) is Part.UNSTOPPABLE_STEP, "nobody could be let in"
    assert kind(Mode.ONLINE_DECODE, 9, 9) is Part.UNSTOPPABLE_STEP
    assert kind(Mode.ONLINE_DECODE, 9, 9, stoppable=True) is Part.STOPPABLE_STEP
    assert kind(Mode.OFFLINE, 0, 9, stoppable=True) is Part.STOPPABLE_STEP


def test_the_share_of_the_online_part() -> None:
    model = LatencyModel(fixed=0.01, per_token=1e-3)
    online, whole = StepShape(), StepShape()
    online.add_prefill(30, 0)
    whole.add_prefill(70, 0)
    assert online_share(model, online, whole) == pytest.approx(0.04 / 0.08)
    assert online_share(model, StepShape(), whole) == 0.0
    assert online_share(model, whole, online) == 1.0, "a step turned out smaller than planned"
