"""P6 where the hosts of tensor-parallel ranks run ahead of their devices by different amounts.

On CUDA a host queues layers and goes on; a collective in each layer ends on no device before all
ranks have queued it. A rank that stops where another goes on leaves that one's device waiting for
ever. Hosts are threads of which one has the turn, chosen at random and seeded; a device gets on
only between turns, as far as its queue and the other ranks allow.
"""

from __future__ import annotations

import os
import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from conserve.engine.flag import StopFlag
from conserve.engine.safepoints import Safepoints, StopStep

NUM_LAYERS = 12
MOST_TURNS = 3000
"""Of one step; a step takes some hundred."""


class HangError(AssertionError):
    """The ranks wait for each other."""


class EndedError(Exception):
    """Takes a host out of a step that hangs."""


class Turns:
    """Threads of which only the one that has the turn runs."""

    def __init__(self, count: int) -> None:
        self.ended = False
        self._mine = [threading.Semaphore(0) for _ in range(count)]
        self._over = threading.Semaphore(0)
        self._me = threading.local()

    def begin(self, number: int) -> None:
        """Called by a thread, which has this number from here on."""
        self._me.number = number
        self._mine[number].acquire()

    def give_up(self) -> None:
        """Called by the thread that has the turn; it goes on when it is given it again."""
        self._over.release()
        self._mine[self._me.number].acquire()
        if self.ended:
            raise EndedError

    def finish(self) -> None:
        self._over.release()

    def give(self, number: int) -> None:
        """Let a thread go on until it gives up its turn."""
        self._mine[number].release()
        self._over.acquire()


class Event:
    """In the queue of one rank's device."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self.is_passed = False

    def record(self) -> None:
        self._rank.queue.append(self)

    def synchronize(self) -> None:
        while not self.is_passed:
            self._rank.turns.give_up()


@dataclass
class Rank:
    """One host and its device."""

    number: int
    turns: Turns
    safepoints: Safepoints
    queue: deque[int | Event] = field(default_factory=deque)
    """Layers and events that the device has not come to."""
    num_queued: int = 0
    num_done: int = 0
    """Layers of the step that the host has queued, and that the device has done."""
    has_ended: bool = False

    def run(self, step: int, every: int) -> None:
        """The host's part of one step: layers, a hook before each, and the device's end of it."""
        self.turns.begin(self.number)
        try:
            self._queue_layers(step, every)
            end = Event(self)
            end.record()
            end.synchronize()
        except EndedError:
            pass
        finally:
            self.has_ended = True
            self.turns.finish()

    def _queue_layers(self, step: int, every: int) -> None:
        self.safepoints.begin(step, every)
        try:
            for layer in range(NUM_LAYERS):
                self.turns.give_up()
                self.safepoints.at_layer()
                self.queue.append(layer)
                self.num_queued += 1
        except StopStep:
            pass
        finally:
            self.safepoints.end()

    def get_on(self, ranks: list[Rank]) -> None:
        """The device does the next thing in its queue, if it can."""
        if not self.queue:
            return
        head = self.queue[0]
        if isinstance(head, Event):
            head.is_passed = True
        elif all(rank.num_queued > head for rank in ranks):
            self.num_done += 1
        else:
            return
        self.queue.popleft()


class Ranks:
    """One engine's, and the engine that raises the flag."""

    def __init__(self, flags: list[StopFlag], seed: int) -> None:
        self.most_apart = 0
        """Layers by which one host was ahead of another."""
        self._engine = flags[0]
        self._chance = random.Random(seed)
        self._turns = Turns(len(flags))
        self.ranks = [self._rank(number, flag) for number, flag in enumerate(flags)]

    def _rank(self, number: int, flag: StopFlag) -> Rank:
        safepoints = Safepoints(flag, number, lambda: Event(self.ranks[number]))
        return Rank(number, self._turns, safepoints)

    def give_up_turn(self) -> None:
        self._turns.give_up()

    def step(self, number: int, every: int, raise_at: int) -> list[int]:
        """Layers that each rank queued. The engine raises the flag after `raise_at` turns.
        Raises HangError."""
        for rank in self.ranks:
            rank.num_queued = rank.num_done = 0
            rank.has_ended = False
        hosts = [threading.Thread(target=rank.run, args=(number, every)) for rank in self.ranks]
        for host in hosts:
            host.start()
        try:
            self._take_turns(number, raise_at)
        finally:
            self._end()
            for host in hosts:
                host.join()
        assert [rank.num_done for rank in self.ranks] == [rank.num_queued for rank in self.ranks]
        return [rank.num_queued for rank in self.ranks]

    def _take_turns(self, number: int, raise_at: int) -> None:
        likely = [self._chance.choice([1, 2, 8]) for _ in self.ranks]
        for turn in range(MOST_TURNS):
            if turn == raise_at:
                self._engine.raise_for(number)
            for rank in self._chance.choices(self.ranks, likely, k=self._chance.randrange(4)):
                rank.get_on(self.ranks)
            if all(rank.has_ended for rank in self.ranks):
                return
            (rank,) = self._chance.choices(self.ranks, likely)
            if not rank.has_ended:
                self._turns.give(rank.number)
            queued = [rank.num_queued for rank in self.ranks]
            self.most_apart = max(self.most_apart, max(queued) - min(queued))
        raise HangError(f"step {number}: {[rank.num_queued for rank in self.ranks]} layers queued")

    def _end(self) -> None:
        self._turns.ended = True
        for rank in self.ranks:
            if not rank.has_ended:
                self._turns.give(rank.number)
        self._turns.ended = False


MakeRanks = Callable[..., Ranks]


@pytest.fixture
def make_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRanks:
    def make(count: int, seed: int, flag: type[StopFlag] = StopFlag) -> Ranks:
        flags = [
            StopFlag("test", str(tmp_path)),
            *(flag("test", str(tmp_path)) for _ in range(1, count)),
        ]
        flags[0].reset()
        ranks = Ranks(flags, seed)
        # A rank that waits for rank 0's word lets the others run.
        monkeypatch.setattr(os, "sched_yield", ranks.give_up_turn)
        return ranks

    return make


def run_random_stops(ranks: Ranks, seed: int, num_steps: int = 60) -> tuple[int, int]:
    """How many steps were stopped in between, and how many ran to their end."""
    chance = random.Random(seed)
    num_between = num_whole = 0
    for number in range(1, num_steps + 1):
        done = ranks.step(number, chance.choice([1, 2, 5]), chance.randrange(150))
        assert len(set(done)) == 1, f"P6: step {number}: ranks did {done} layers"
        num_between += 0 < done[0] < NUM_LAYERS
        num_whole += done[0] == NUM_LAYERS
    return num_between, num_whole


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_apart_stop_at_the_same_layer_or_none_does(
    make_ranks: MakeRanks, count: int, seed: int
) -> None:
    ranks = make_ranks(count, seed)
    num_between, num_whole = run_random_stops(ranks, seed)
    assert num_between > 5
    assert num_whole > 5
    assert ranks.most_apart > 2, "some host was well ahead of another"


# Negative controls


class LooksForItself(StopFlag):
    """Careless: each rank looks at the engine's flag when its host comes by."""

    def follow(self, step: int, point: int) -> bool:
        return self.is_raised_for(step)


class NeverStops(StopFlag):
    def follow(self, step: int, point: int) -> bool:
        return False


@pytest.mark.parametrize("careless", [LooksForItself, NeverStops])
def test_a_rank_that_does_not_wait_for_the_word_is_caught(
    make_ranks: MakeRanks, careless: type[StopFlag]
) -> None:
    with pytest.raises(HangError, match="layers queued"):
        run_random_stops(make_ranks(2, 1, careless), 1)
