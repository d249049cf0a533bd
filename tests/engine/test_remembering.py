"""Conversations that pause beside a sweep, through the real scheduler: what they find again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.core.calibration import Recalibrator
from conserve.core.latency import LatencyModel
from conserve.core.settings import PolicySettings
from conserve.engine.settings import EngineSettings
from tests.engine.device import VOCABULARY, Device, expected_output
from tests.engine.engine import BLOCK_SIZE, Engine, make_request, make_scheduler
from tests.engine.test_checkpoints import totals_of

pytestmark = pytest.mark.engine

MakeEngine = Callable[..., Engine]
MODEL = LatencyModel(fixed=0.002, per_token=0.01)
TURNS = 24
TALKS = 3
WARM_UP = 12
"""Turns before what is found counts: until then nobody knows that they come back."""


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[MakeEngine]:
    made: list[Any] = []

    def make(*, depth: int = 1, num_blocks: int = 100, **policy: Any) -> Engine:
        settings = EngineSettings(
            profile_seconds=0, checkpoint="off", policy=PolicySettings(**policy)
        )
        scheduler = make_scheduler(
            tmp_path, settings=settings, async_scheduling=depth > 1, num_blocks=num_blocks
        )
        made.append(scheduler)
        scheduler.experience.recalibrator = Recalibrator(MODEL, mean_error=0.02)
        return TimedEngine(scheduler, Device(BLOCK_SIZE), depth=depth)

    yield make
    for scheduler in made:
        scheduler.shutdown()


class TimedEngine(Engine):
    """Its steps take what MODEL says, so that a prefix that is found saves time."""

    def seconds(self, record: Any) -> float:
        return MODEL.predict_s(record.shape)


class Talks:
    """Conversations that take turns, each with its history, beside documents always queued."""

    def __init__(self, engine: Engine, seed: int = 3) -> None:
        self.engine = engine
        self.wanted: dict[str, list[int]] = {}
        self.num_documents = 0
        self._chance = random.Random(seed)
        self._texts = [self._words(48) for _ in range(TALKS)]

    def _words(self, count: int) -> list[int]:
        return [self._chance.randrange(1, VOCABULARY) for _ in range(count)]

    def _send(self, name: str, prompt: list[int], length: int, *, online: bool) -> None:
        arrival_s = self.engine.scheduler.clock.now_s
        request = make_request(name, prompt, length, online=online, arrival_s=arrival_s)
        self.engine.add(request)
        self.wanted[name] = expected_output(prompt, length)

    def keep_sweeping(self) -> None:
        while len(self.engine.scheduler.waiting.offline) < 4:
            self._send(f"doc{self.num_documents}", self._words(60), 40, online=False)
            self.num_documents += 1

    def turn(self, number: int, *, sweeping: bool) -> None:
        """One conversation speaks, and somebody speaks again a while after it has its answer."""
        text, name = self._texts[number % TALKS], f"turn{number}"
        self._send(name, list(text), 2, online=True)
        text += self.wanted[name][:1]
        while name not in self.engine.finished:
            self.engine.step()
        for _ in range(40):
            if sweeping:
                self.keep_sweeping()
            self.engine.step()


def share_found(engine: Engine, *, sweeping: bool = True) -> float:
    """Of what conversations asked for once they had come back a few times."""
    talks, totals = Talks(engine), totals_of(engine)
    for number in range(TURNS):
        if number == WARM_UP:
            totals.clear()
        talks.turn(number, sweeping=sweeping)
    found = totals["prefix_hit_tokens online"] / totals["prompt_tokens online"]
    engine.run()
    assert engine.outputs == talks.wanted
    return found


@pytest.mark.parametrize("depth", [1, 2])
def test_conversations_find_their_history_beside_a_sweep(
    make_engine: MakeEngine, depth: int
) -> None:
    """As much of it as without the sweep, but for a twentieth."""
    alone = share_found(make_engine(depth=depth), sweeping=False)
    beside = share_found(make_engine(depth=depth))
    assert alone > 0.8
    assert beside >= 0.95 * alone


@pytest.mark.parametrize(
    "policy", [{"room_max_share": 0.0}, {"room_max_share": 0.0, "class_aware": False}]
)
def test_without_the_room_they_do_not(make_engine: MakeEngine, policy: dict[str, Any]) -> None:
    assert share_found(make_engine(**policy)) < 0.5


def test_what_the_sweep_drove_out_is_counted(make_engine: MakeEngine) -> None:
    """Without the room, and with it off the sweep's back nothing is lost to it."""
    engine = make_engine(room_max_share=0.0)
    totals = totals_of(engine)
    share_found(engine)
    missed = totals["prompt_tokens online"] - totals["prefix_hit_tokens online"]
    assert 0 < totals["lost_history_tokens"] <= missed
    assert totals["lost_history_seconds"] > 0


def test_what_chat_drives_out_itself_is_not_the_sweeps_doing(make_engine: MakeEngine) -> None:
    """Memory holds two of three conversations, and there is no sweep."""
    engine = make_engine(num_blocks=34)
    totals = totals_of(engine)
    found = share_found(engine, sweeping=False)
    assert found < 0.5
    assert "lost_history_tokens" not in totals


def test_an_emptied_prefix_cache_is_nobodys_loss(make_engine: MakeEngine) -> None:
    engine = make_engine()
    totals, talks = totals_of(engine), Talks(engine)
    for number in range(6):
        talks.turn(number, sweeping=True)
    engine.run()
    before = totals.get("lost_history_tokens", 0.0)
    assert engine.scheduler.reset_prefix_cache()
    for number in range(6, 9):
        talks.turn(number, sweeping=False)
    assert totals.get("lost_history_tokens", 0.0) == before
