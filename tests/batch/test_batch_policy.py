"""The order of batches, deadlines, the window and the lifecycle: pure functions."""

from __future__ import annotations

import io
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from msgspec import structs

from conserve.batch import deadlines
from conserve.batch.errors import BadTransitionError
from conserve.batch.executor import Reply
from conserve.batch.in_flight import FIRST, HOLD_S, InFlightWindow, retry_delay_s
from conserve.batch.lifecycle import LIVE, TERMINAL, TRANSITIONS, Status, check
from conserve.batch.outcome import failure, from_reply, keep_reply, never_ran
from conserve.batch.outlook import Outlook
from conserve.batch.records import Line
from conserve.batch.wire import deadline_time, duration_s
from tests.batch.batch_fakes import FakeClock

HOUR = 3600.0
HARVEST = deadlines.RecentHarvest(tokens_per_s=100.0, mean_output_tokens=10.0)


def view(
    name: str, *, came: float = 0, due: float = 24 * HOUR, tokens: float = 1000, priority: int = 10
) -> deadlines.BatchView:
    return deadlines.BatchView(name, came, priority, due, tokens)


def names(
    *views: deadlines.BatchView, now: float = 0, harvest: deadlines.RecentHarvest = HARVEST
) -> str:
    shuffled = list(views)
    orders = set()
    for seed in range(5):
        random.Random(seed).shuffle(shuffled)
        orders.add("".join(v.batch_id for v in deadlines.order(shuffled, now, harvest)))
    assert len(orders) == 1  # the order does not depend on how the batches come
    return orders.pop()


def test_equals_go_first_come_first_served() -> None:
    assert names(view("b", came=2), view("a", came=1), view("c", came=3)) == "abc"


def test_a_near_deadline_goes_before_a_far_one() -> None:
    assert names(view("far", came=1), view("near", came=2, due=HOUR)) == "nearfar"


def test_priority_goes_before_slack_and_risk_before_priority() -> None:
    low = view("low", priority=1, came=3)
    near = view("near", came=2, due=HOUR)
    risky = view("risky", came=4, due=30, priority=1000)
    assert names(low, near, risky) == "riskylownear"


def test_slack_counts_the_work_that_is_left() -> None:
    small = view("small", came=1, due=2 * HOUR)
    large = view("large", came=2, due=2 * HOUR, tokens=100.0 * 1.5 * HOUR)
    assert names(small, large) == "largesmall"
    # Without a rate, work takes no time that is known.
    assert names(small, large, harvest=deadlines.RecentHarvest()) == "smalllarge"


def test_among_those_at_risk_the_least_slack_goes_first() -> None:
    assert names(view("b", came=1, due=50), view("a", came=2, due=20)) == "ab"


def test_the_engine_is_told_the_risk_or_the_priority() -> None:
    calm, risky = view("a", priority=7), view("b", due=30, priority=7)
    assert deadlines.engine_priority(calm, is_urgent=False) == 8
    assert deadlines.engine_priority(risky, is_urgent=True) == deadlines.MOST_URGENT == 1


def test_a_batch_ends_after_what_goes_before_it() -> None:
    views = [view("b", tokens=500), view("a", tokens=1000)]
    seen = Outlook.over(views, 100.0, HARVEST)
    assert {name: each.finish_at for name, each in seen.prospects.items()} == {"a": 110, "b": 115}
    unknown = Outlook.over(views, 100.0, deadlines.RecentHarvest())
    assert [each.finish_at for each in unknown.prospects.values()] == [None, None]


def test_a_batch_does_not_wait_for_another_models() -> None:
    views = [view("a", tokens=1000), replace(view("b", tokens=500), model="other")]
    seen = Outlook.over(views, 100.0, HARVEST)
    assert {name: each.finish_at for name, each in seen.prospects.items()} == {"a": 110, "b": 105}


@pytest.mark.parametrize(
    ("due", "tokens", "state"),
    [
        (HOUR, 1000, "on_track"),
        (65, 1000, "at_risk"),
        (HOUR, 100 * HOUR + 1, "will_miss"),
        (0, 0, "will_miss"),
    ],
)
def test_a_deadline_is_judged_by_finish_and_slack(due: float, tokens: float, state: str) -> None:
    one = view("a", due=due, tokens=tokens)
    assert Outlook.over([one], 0, HARVEST).prospects["a"].state == state


def test_an_unknown_rate_says_so() -> None:
    assert deadlines.deadline_state(view("a"), None, 0, deadlines.RecentHarvest()) == "unknown"


def test_moves_follow_the_table_and_every_live_batch_can_end() -> None:
    assert frozenset(TRANSITIONS) == frozenset(Status)
    assert {Status.FAILED, Status.COMPLETED, Status.EXPIRED, Status.CANCELLED} == TERMINAL
    for current, target in itertools.product(Status, Status):
        if target in TRANSITIONS[current]:
            check(current, target)
        else:
            with pytest.raises(BadTransitionError):
                check(current, target)
    for status in LIVE:  # every live batch can end
        reached, frontier = set(), {status}
        while frontier:
            reached |= frontier
            frontier = set().union(*(TRANSITIONS[s] for s in frontier)) - reached
        assert reached & TERMINAL


def test_a_duration_is_a_whole_number_and_a_unit() -> None:
    assert [duration_s(word) for word in ("24h", "30m", "90s", "7d")] == [86400, 1800, 90, 604800]
    for word in ("", "24", "h", "0h", "-1h", "1.5h", "24 h", "31d", "1w", "\uff12h"):
        with pytest.raises(ValueError, match="must be"):
            duration_s(word)


def test_a_deadline_is_a_duration_or_a_time_ahead() -> None:
    now = 1_000_000.0
    assert deadline_time("2h", now) == now + 7200
    assert deadline_time(1_000_060, now) == 1_000_060.0
    assert deadline_time("1970-01-12T13:46:41Z", now) == 1_000_001.0
    for word in ("soon", "1970-01-12T13:46:41", 999_999, now, float("nan"), 10**12):
        with pytest.raises(ValueError, match="must"):
            deadline_time(word, now)


def test_the_window_grows_with_results_and_halves_once_an_overload() -> None:
    clock = FakeClock(0)
    window = InFlightWindow(40, clock)
    assert window.limit == FIRST
    for _ in range(100):
        window.on_result()
    assert window.limit == 40
    for _ in range(10):
        window.on_overload()
    assert window.limit == 20
    for _ in range(20):
        clock.advance(HOLD_S)
        window.on_overload()
    assert window.limit == 1
    assert InFlightWindow(4).limit == 4


def test_delays_grow_to_a_minute() -> None:
    assert [retry_delay_s(n) for n in (0, 1, 2, 5, 6, 100)] == [1, 2, 4, 32, 60, 60]


LINE = Line("batch_x", 1, 'a "quoted" id', 0, 0, 0)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_the_servers_fault_is_no_result(status: int) -> None:
    assert from_reply(LINE, Reply(status, b"{}")) is None


@pytest.mark.parametrize("status", [200, 400, 404, 422])
def test_an_answer_is_kept_on_one_line(status: int) -> None:
    result = from_reply(LINE, Reply(status, b'{\n  "a": "b\\nc"\n}', "req_1"))
    assert result is not None
    assert b"\n" not in result.payload
    assert result.failed == (status != 200)
    kept = json.loads(result.payload)
    assert kept["custom_id"] == LINE.custom_id
    assert kept["response"] == {
        "status_code": status,
        "request_id": "req_1",
        "body": {"a": "b\nc"},
    }


@pytest.mark.parametrize("split", [str.splitlines, lambda text: list(io.StringIO(text))])
@pytest.mark.parametrize("end", ["\u0085", "\u2028", "\u2029", "\v", "\f", "\x1c", "\x1e"])
def test_results_are_a_line_each_however_lines_are_split(
    split: Callable[[str], list[str]], end: str
) -> None:
    line = structs.replace(LINE, custom_id=f"a{end}b")
    said = json.dumps({"content": f"one{end}two\\{end}"}, ensure_ascii=False).encode()
    kept = keep_reply(line, Reply(200, said)).payload
    unrun = never_ran("batch_x", 1, line.custom_id, "batch_expired")
    pieces = split(b"\n".join((kept, unrun, failure(line, "x", end).payload)).decode())
    first, second, third = map(json.loads, pieces)
    assert first["response"]["body"]["content"] == f"one{end}two\\{end}"
    assert {each["custom_id"] for each in (first, second, third)} == {line.custom_id}


@pytest.mark.parametrize("body", [b"", b"<html>", b'"\xff"', b"{"])
def test_what_is_no_json_is_no_answer(body: bytes) -> None:
    kept = json.loads(keep_reply(LINE, Reply(200, body)).payload)
    assert kept["response"] is None
    assert kept["error"]["code"] == "invalid_response"


def test_usage_of_both_spellings_and_of_nonsense() -> None:
    chat = {"prompt_tokens": 3, "completion_tokens": 2, "completion_tokens_details": None}
    responses = {
        "input_tokens": 3,
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 1},
    }
    for usage, reasoning in ((chat, 0), (responses, 1)):
        tokens = keep_reply(LINE, Reply(200, json.dumps({"usage": usage}).encode())).tokens
        assert (tokens.input, tokens.output, tokens.reasoning) == (3, 2, reasoning)
    for body in (b"[]", b'{"usage": 5}', b'{"usage": {"prompt_tokens": "x"}}', b"7"):
        assert keep_reply(LINE, Reply(200, body)).tokens.total == 0


def test_a_line_that_never_ran_says_why() -> None:
    kept = json.loads(never_ran("batch_x", 1, "a", "batch_expired"))
    assert (kept["response"], kept["error"]["code"]) == (None, "batch_expired")
