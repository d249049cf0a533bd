"""Sessions: requests that are told more when they have answered. They keep their blocks meanwhile,
and what they said last is no part of what follows. Beside copies that dawdle and are checked."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("vllm")

from conserve.engine import tracker as tracker_module
from conserve.engine.checkpoint import keeping
from tests.engine.device import VOCABULARY, expected_output
from tests.engine.engine import Engine, make_request
from tests.engine.test_checkpoints import MakeEngine, assert_nothing_left, make_engine
from tests.engine.test_conversations import make_quick

__all__ = ["make_engine"]
pytestmark = pytest.mark.engine

NUM_SESSIONS, NUM_TURNS = 3, 4


class Crowd:
    """Offline sessions among documents, and chats that need their blocks."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine, self.chance = engine, random.Random(seed)
        self.wanted: dict[str, list[int]] = {}
        self.histories: dict[str, list[int]] = {f"talk{i}": [] for i in range(NUM_SESSIONS)}
        self.num_told = dict.fromkeys(self.histories, 0)
        for name in self.histories:
            engine.outputs[name] = self.wanted[name] = []
            self.wanted[name] = []

    def words(self, fewest: int, most: int) -> list[int]:
        return [
            self.chance.randrange(1, VOCABULARY) for _ in range(self.chance.randint(fewest, most))
        ]

    def request(
        self, name: str, words: list[int], length: int, *, online: bool, more: bool
    ) -> None:
        now_s = self.engine.scheduler.clock.now_s
        request = make_request(name, words, length, online=online, arrival_s=now_s)
        request.resumable = more
        self.engine.scheduler.add_request(request)

    def tell(self, name: str) -> None:
        prompt = self.histories[name] + (told := self.words(1, 13))
        answer = expected_output(prompt, self.chance.randint(1, 7))
        self.wanted[name] += answer
        self.histories[name] = prompt + answer[:-1]
        self.num_told[name] += 1
        self.request(name, told, len(answer), online=False, more=True)

    def come(self, name: str, *, online: bool) -> None:
        prompt = self.words(10, 40)
        self.engine.outputs[name] = []
        self.wanted[name] = expected_output(prompt, self.chance.randint(1, 8))
        self.request(name, prompt, len(self.wanted[name]), online=online, more=False)

    def run(self) -> None:
        for turn in range(400):
            if len(self.engine.scheduler.requests) < 14:
                self.come(f"other{turn}", online=self.chance.random() < 0.3)
            for name, num in self.num_told.items():
                if num < NUM_TURNS and self.chance.random() < 0.3:
                    self.tell(name)
            self.engine.step()
        for name in self.histories:
            self.request(name, [1], 1, online=False, more=False)
        self.engine.run()
        assert self.engine.outputs == self.wanted
        assert_nothing_left(self.engine)


def run_crowds(make_engine: MakeEngine, depth: int, num: int) -> None:
    for seed in range(num):
        engine = make_quick(make_engine, depth, num_blocks=50, pace=2)
        chance = random.Random(seed)
        engine.stop = lambda step, chance=chance: chance.random() < 0.3
        Crowd(engine, seed).run()


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
def test_sessions_say_what_they_say_alone(make_engine: MakeEngine, depth: int) -> None:
    run_crowds(make_engine, depth, 5)


def copies_of_lost_blocks(engine: Engine) -> int:
    """Copies that go on out of a session's blocks when an arrival has taken these."""
    scheduler = engine.scheduler

    def tell(words: list[int]) -> None:
        now_s = scheduler.clock.now_s
        request = make_request("talk", words, 6, online=False, arrival_s=now_s)
        request.resumable = True
        scheduler.add_request(request)

    engine.outputs["talk"] = []
    tell(list(range(1, 31)))
    while len(engine.outputs["talk"]) < 6:
        engine.step()
    tell([41, 42, 43])
    assert list(scheduler.kv_holding_waiting), "it waits with its blocks"
    scheduler.keeper.give_back({"talk"})
    assert not scheduler.kv_holding_waiting
    under_way = scheduler.checkpointer.under_way.of("talk", store=True)
    return sum(not sent.dropped for sent in under_way)


def test_nothing_is_copied_out_of_blocks_that_a_session_has_lost(make_engine: MakeEngine) -> None:
    assert copies_of_lost_blocks(make_engine(pace=1)) == 0


def test_copies_of_sessions_are_caught(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: they are copied to the host as other offline requests are."""
    for module in (tracker_module, keeping):
        monkeypatch.setattr(module, "comes_back", lambda request: True)
    assert copies_of_lost_blocks(make_engine(pace=1)) > 0
