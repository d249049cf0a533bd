"""Owners share the harvest: who is next, how far deadlines bend that, and what several workers on
one store come to."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conserve.batch import deadlines
from conserve.batch.deadlines import BatchView, RecentHarvest
from conserve.batch.outlook import Outlook
from conserve.batch.shares import CREDIT_S, MEMORY_S, Levels, Standing
from conserve.batch.turns import Turns

RATE = 100.0
LINE_TOKENS = 50.0
HARVEST = RecentHarvest(RATE, 10.0)
WINDOW = 16
TOGETHER: Collection[str] = ("m", "adapter")
"""Models that the servers have."""
DAY_S = 86_400.0


def view(
    tenant: str, name: str = "", *, due: float = DAY_S, lines: int = 10_000, priority: int = 10
) -> BatchView:
    tokens = lines * LINE_TOKENS
    return BatchView(
        name or f"{tenant}-1", 0.0, priority, due, tokens, "m", num_left=lines, tenant=tenant
    )


@dataclass
class World:
    """Servers of one model that run WINDOW lines at once, RATE tokens a second in all, and look at
    the store once a second, in turns: each sees what the others have done."""

    shares: Mapping[str, float]
    batches: dict[str, BatchView]
    num_workers: int = 1
    now_s: float = 0.0
    served: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    tokens: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    running: list[str] = field(default_factory=list)
    turns: list[Turns] = field(default_factory=list)

    def share_of(self, tenant: str) -> float:
        return self.shares.get(tenant, 1.0)

    def standing(self) -> Standing:
        counts = {name: self.running.count(name) for name in self.batches}
        return Standing(dict(self.served), counts, self.share_of)

    def second(self, worker: int) -> None:
        """One look of one worker, and the lines that end until the next."""
        while len(self.turns) < self.num_workers:
            self.turns.append(Turns())
        left = [each for each in self.batches.values() if each.num_left > 0]
        outlook = Outlook.over(left, self.now_s, HARVEST, self.standing(), TOGETHER)
        for tenant, floor in outlook.floors.items():
            self.served[tenant] = max(self.served[tenant], floor)
        free = WINDOW - len(self.running)
        waiting = {each.batch_id for each in left if each.num_left > self._running(each)}
        for prospect, limit in self.turns[worker].share_out(outlook, waiting, free):
            assert limit <= prospect.view.num_left - self._running(prospect.view)
            self.running += [prospect.view.batch_id] * limit
            self.turns[worker].took(prospect, limit)
        for _ in range(int(RATE / LINE_TOKENS)):
            self._end_one()
        self.now_s += 1.0

    def _running(self, one: BatchView) -> int:
        return self.running.count(one.batch_id)

    def _end_one(self) -> None:
        if not self.running:
            return
        one = self.batches[self.running.pop(0)]
        left = one.num_left - 1
        self.batches[one.batch_id] = replace(
            one, num_left=left, remaining_tokens=left * LINE_TOKENS
        )
        self.served[one.tenant] += LINE_TOKENS / self.share_of(one.tenant)
        self.tokens[one.tenant] += LINE_TOKENS

    def run(self, seconds: int, each: Callable[[], None] = lambda: None) -> None:
        for second in range(seconds):
            each()
            self.second(second % self.num_workers)


def world(shares: Mapping[str, float], *views: BatchView, num_workers: int = 1) -> World:
    return World(shares, {each.batch_id: each for each in views}, num_workers)


@given(
    shares=st.dictionaries(
        st.sampled_from("abcde"), st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=2
    ),
    num_workers=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_who_always_has_work_gets_its_share(
    shares: dict[str, float], num_workers: int, seed: int
) -> None:
    """Whatever priorities and far deadlines their batches have."""
    chance = random.Random(seed)
    views = [
        view(
            tenant,
            f"{tenant}-{n}",
            due=DAY_S * chance.randint(30, 60),
            priority=chance.randint(1, 99),
        )
        for tenant in shares
        for n in range(chance.randint(1, 3))
    ]
    one = world(shares, *views, num_workers=num_workers)
    one.run(300)
    check_even(one, slack_tokens=WINDOW * LINE_TOKENS)


def check_even(one: World, slack_tokens: float) -> None:
    """All tenants have had the same over their shares, but for `slack_tokens`."""
    levels = [one.tokens[tenant] / one.share_of(tenant) for tenant in one.shares]
    least_share = min(map(one.share_of, one.shares))
    assert max(levels) - min(levels) <= 2 * slack_tokens / least_share


def hurried() -> World:
    """One owner with a new batch at risk every minute, and one with a batch that has time."""
    return world({"a": 1.0, "b": 1.0}, view("b", due=30 * DAY_S))


def new_deadlines(one: World, model: str = "m") -> Callable[[], None]:
    """Each could be kept by a's whole harvest, and none by half of it."""

    def each() -> None:
        if one.now_s % 60 == 0:
            name = f"a-{one.now_s}"
            hasty = view("a", name, due=one.now_s + 100, lines=120)
            one.batches[name] = replace(hasty, model=model)

    return each


@pytest.mark.parametrize("model", ["m", "adapter"])
def test_endless_deadlines_do_not_always_go_first(model: str) -> None:
    one = hurried()
    one.run(1800, new_deadlines(one, model))
    pace = RATE / 2
    assert one.tokens["a"] - one.tokens["b"] <= CREDIT_S * pace + 2 * WINDOW * LINE_TOKENS
    assert one.tokens["a"] > one.tokens["b"]  # they do go first for a while


def test_a_careless_order_lets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: whatever is at risk goes first."""
    monkeypatch.setattr(Levels, "may_hurry", lambda *_: True)
    with pytest.raises(AssertionError):
        test_endless_deadlines_do_not_always_go_first("m")


def test_who_has_no_line_yet_keeps_nobody_from_a_deadline() -> None:
    """Its file is still looked through, for as long as that takes."""
    hasty, calm = view("a", due=100, lines=190), view("c", due=30 * DAY_S)
    ahead = Standing({"a": 1e6, "c": 1e6})
    unknown = replace(view("b"), num_left=0)
    assert Outlook.over([hasty, calm, unknown], 0.0, HARVEST, ahead).prospects["a-1"].is_urgent
    able = view("b")
    assert not Outlook.over([hasty, calm, able], 0.0, HARVEST, ahead).prospects["a-1"].is_urgent


def test_names_of_one_server_that_are_taken_for_others_let_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative control: an adapter's batches are reckoned by themselves."""
    monkeypatch.setattr("tests.batch.test_batch_shares.TOGETHER", ())
    with pytest.raises(AssertionError):
        test_endless_deadlines_do_not_always_go_first("adapter")


def test_a_careless_turn_is_uneven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: levels that do not count what was had."""
    monkeypatch.setattr(World, "standing", lambda self: Standing({}, {}, self.share_of))
    one = world({"a": 4.0, "b": 1.0}, view("a"), view("b"))
    one.run(300)
    with pytest.raises(AssertionError):
        check_even(one, slack_tokens=WINDOW * LINE_TOKENS)


def test_a_hopeless_deadline_does_not_make_others_late() -> None:
    """b's could never be kept; a's can, as long as nothing goes before it."""
    late = view("a", "late", due=60, lines=10_000)
    kept = view("a", "kept", due=300, lines=500)
    one = world({}, late, kept)
    one.run(260)
    assert one.batches["kept"].num_left == 0


def test_a_hopeless_deadline_that_goes_first_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: it is taken for one at risk."""
    monkeypatch.setattr(deadlines, "is_hopeless", lambda *_: False)
    monkeypatch.setattr(deadlines, "slack_band", lambda *_: 0)
    with pytest.raises(AssertionError):
        test_a_hopeless_deadline_does_not_make_others_late()


def test_another_owners_hopeless_deadline_takes_its_share_and_no_more() -> None:
    one = world({"a": 1.0, "b": 1.0}, view("a", due=60), view("b", due=30 * DAY_S))
    one.run(300)
    check_even(one, slack_tokens=WINDOW * LINE_TOKENS)


def test_credit_for_time_without_work_is_bounded() -> None:
    """a has had the machine for hours; b comes back, gets its credit, and then its half."""
    one = world({"a": 1.0, "b": 1.0}, view("a"))
    one.served["a"] = 10_000_000.0
    one.run(100)
    one.batches["b-1"] = view("b")
    before = one.tokens["a"]
    one.run(1500)
    pace = RATE / 2
    lead = one.tokens["b"] - (one.tokens["a"] - before)
    assert lead <= MEMORY_S * pace + 2 * WINDOW * LINE_TOKENS
    assert lead > 0
    assert one.tokens["a"] > before  # and a is not starved meanwhile for longer than that


def test_who_is_alone_gets_everything() -> None:
    one = world({"a": 0.001}, view("a"))
    one.run(100)
    assert one.tokens["a"] == 100 * RATE


def test_an_estimate_knows_that_others_have_their_share() -> None:
    views = [view("a", lines=100), view("b", "b-1", lines=100), view("b", "b-2", lines=100)]
    even = Outlook.over(views, 0.0, HARVEST).prospects
    assert {name: each.finish_at for name, each in even.items()} == {
        "a-1": 100.0,
        "b-1": 100.0,
        "b-2": 150.0,
    }
    ahead = Standing({"a": 10_000.0})
    assert Outlook.over(views, 0.0, HARVEST, ahead).prospects["a-1"].finish_at == 150.0
    heavy = Standing({}, {}, lambda tenant: 3.0 if tenant == "a" else 1.0)
    found = Outlook.over(views, 0.0, HARVEST, heavy).prospects["a-1"].finish_at
    assert found == pytest.approx(50 * 4 / 3)


def test_estimates_are_what_happens() -> None:
    shares = {"a": 1.0, "b": 2.0, "c": 0.5}
    views = [view(tenant, lines=100 + 50 * n) for n, tenant in enumerate(shares)]
    one = world(shares, *views)
    told = Outlook.over(views, 0.0, HARVEST, one.standing()).prospects
    ended = dict[str, float]()

    def note() -> None:
        for name, batch in one.batches.items():
            if batch.num_left == 0:
                ended.setdefault(name, one.now_s)

    one.run(600, note)
    for name, at in ended.items():
        assert told[name].finish_at == pytest.approx(at, abs=2 * WINDOW * LINE_TOKENS / RATE)
    assert set(ended) == set(one.batches)
