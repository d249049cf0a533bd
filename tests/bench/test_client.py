"""The load client against a server with known delays, on a clock that jumps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from conserve.bench.client import Body, Load, LoadClient
from conserve.metrics import CUT_OFF, RequestRecord, percentile
from conserve.workload import RequestPlan, Window, Workload
from tests.bench import token_server

WINDOW = Window(lead_in_s=5.0, duration_s=20.0, drain_s=10.0)


def online(index: int, arrival_s: float, num_output_tokens: int = 4) -> RequestPlan:
    return RequestPlan(f"online-{index}", True, arrival_s, 10, num_output_tokens)


def offline(index: int, num_output_tokens: int = 4) -> RequestPlan:
    return RequestPlan(f"offline-{index}", False, -5.0, 10, num_output_tokens)


def body(plan: RequestPlan) -> dict[str, Any]:
    return {
        "id": plan.request_id,
        "prompt": [1] * plan.num_prompt_tokens,
        "max_tokens": plan.num_output_tokens,
    }


@pytest.fixture
def drive(in_virtual_time: Any, connect: Any) -> Callable[..., Load]:
    """Runs a workload against a server and returns what the client saw."""

    def run(
        server: Any,
        workload: Workload,
        window: Window = WINDOW,
        client: type = LoadClient,
        body: Body = body,
    ) -> Load:
        load = Load()

        async def main() -> None:
            async with connect(server) as http:
                await client(http, body).run(workload, window, load)

        in_virtual_time(main())
        return load

    return run


def test_times_are_the_servers_delays(drive: Any) -> None:
    server = token_server.TokenServer(token_server.steady(0.5, 0.1))
    load = drive(server, Workload(online=[online(0, 2.0), online(1, 3.0)]))
    for record in load.records:
        assert record.error is None
        assert record.ttft_s == pytest.approx(0.5)
        assert record.tbts_s == pytest.approx([0.1] * 3)
        assert (record.num_prompt_tokens, record.num_output_tokens) == (10, 4)
    assert [record.arrival_s for record in load.records] == [2.0, 3.0]


def test_tokens_of_one_message_share_its_time(drive: Any) -> None:
    server = token_server.TokenServer(lambda _body: [(1.0, 1), (0.5, 3)])
    (record,) = drive(server, Workload(online=[online(0, 0.0)])).records
    assert record.token_times_s == pytest.approx([1.0, 1.5, 1.5, 1.5])
    assert record.error is None


def test_percentiles_of_known_delays(drive: Any) -> None:
    def schedule(request: dict[str, Any]) -> list[tuple[float, int]]:
        return [(0.01 * int(request["id"].split("-")[1]), 1)]

    server = token_server.TokenServer(schedule)
    load = drive(server, Workload(online=[online(i, i * 0.1, 1) for i in range(101)]))
    ttfts = [record.ttft_s for record in load.records if record.ttft_s is not None]
    assert len(ttfts) == 101
    assert percentile(ttfts, 50) == pytest.approx(0.50)
    assert percentile(ttfts, 99) == pytest.approx(0.99)


def assert_open_loop(server: Any, plans: list[RequestPlan]) -> None:
    """Requests reach the server when they arrive, however late it answers others."""
    sent = {request["id"]: time_s for time_s, request in server.seen}
    assert sent == {p.request_id: pytest.approx(p.arrival_s + WINDOW.lead_in_s) for p in plans}


def test_a_slow_server_delays_no_arrival(drive: Any) -> None:
    server = token_server.TokenServer(token_server.steady(4.0, 0.5))
    plans = [online(i, 0.3 * i) for i in range(20)]
    drive(server, Workload(online=plans))
    assert_open_loop(server, plans)


def test_a_closed_loop_would_be_noticed(drive: Any) -> None:
    class ClosedLoop(LoadClient):
        _turn: asyncio.Lock | None = None

        async def _send(self, *request: Any) -> RequestRecord:
            self._turn = self._turn or asyncio.Lock()
            async with self._turn:
                return await super()._send(*request)

    server = token_server.TokenServer(token_server.steady(4.0, 0.5))
    plans = [online(i, 0.3 * i) for i in range(5)]
    drive(server, Workload(online=plans), client=ClosedLoop)
    assert len(server.seen) == len(plans)
    with pytest.raises(AssertionError):
        assert_open_loop(server, plans)


def test_offline_places_are_always_full(drive: Any) -> None:
    server = token_server.TokenServer(token_server.steady(0.7, 0.1))
    load = drive(server, Workload(offline=[offline(i) for i in range(200)], in_flight=3))
    # An answer's end and the next request share an instant: what counts is how each ends.
    at_instants = {time_s: count for time_s, count in server.running if time_s < 25.0 - 1e-6}
    assert set(at_instants.values()) == {3}
    assert min(at_instants) == 0.0
    assert max(count for _, count in server.running) == 3
    starts = sorted(record.arrival_s for record in load.records)
    assert starts[:3] == [pytest.approx(-5.0)] * 3
    assert sum(record.error == CUT_OFF for record in load.records) == 3
    assert not any(record.failed for record in load.records)
    # 1.0 s each: 25 s in 3 places.
    assert sum(record.finished for record in load.records) == pytest.approx(75, abs=3)


def test_the_drain_waits_for_online_and_no_longer(drive: Any) -> None:
    server = token_server.TokenServer(token_server.steady(1.0, 1.0))
    load = drive(server, Workload(online=[online(0, 19.0, 8), online(1, 19.0, 30)]))
    finished, cut = sorted(load.records, key=lambda record: record.request_id)
    assert finished.error is None
    assert finished.token_times_s[-1] == pytest.approx(27.0)
    assert cut.failed
    assert cut.error == "not finished when the run ended"
    assert cut.token_times_s[-1] <= 30.0 + 1e-6


def test_offline_work_goes_on_while_online_drains(drive: Any) -> None:
    server = token_server.TokenServer(token_server.steady(1.0, 0.5))
    plans = [offline(i, 2) for i in range(99)]
    load = drive(server, Workload(online=[online(0, 19.9, 8)], offline=plans, in_flight=1))
    online_end_s = max(r.token_times_s[-1] for r in load.records if r.online)
    offline_end_s = max(t for r in load.records if not r.online for t in r.token_times_s)
    assert online_end_s - offline_end_s < 1.5


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"status": 503}, "HTTP 503"),
        ({"break_off": True}, "broke off after 1 tokens"),
        ({"complain": True}, "out of memory"),
        ({"extra_prompt_tokens": 1}, r"\(11, 4\) prompt and output tokens, not \(10, 4\)"),
    ],
)
def test_what_goes_wrong_is_recorded(drive: Any, faults: dict[str, Any], message: str) -> None:
    server = token_server.TokenServer(token_server.steady(0.1, 0.1), **faults)
    (record,) = drive(server, Workload(online=[online(0, 0.0)])).records
    assert record.failed
    with pytest.raises(ValueError, match=message):
        raise ValueError(record.error)


def test_a_failing_server_is_not_hammered(drive: Any) -> None:
    server = token_server.TokenServer(token_server.steady(0.1, 0.1), status=500)
    load = drive(server, Workload(offline=[offline(i) for i in range(500)], in_flight=2))
    assert len(load.records) <= 2 * (WINDOW.lead_in_s + WINDOW.duration_s + 1)
    assert all(record.failed for record in load.records)


def test_what_was_seen_survives_being_cancelled(in_virtual_time: Any, connect: Any) -> None:
    server = token_server.TokenServer(token_server.steady(0.5, 0.5))
    load = Load()

    async def main() -> None:
        async with connect(server) as http:
            workload = Workload([online(0, 0.0, 40)], [offline(i) for i in range(9)], 1)
            run = asyncio.create_task(LoadClient(http, body).run(workload, WINDOW, load))
            await asyncio.sleep(9.0)
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)

    in_virtual_time(main())
    assert server.running[-1][1] == 0
    by_error = {record.error for record in load.records}
    assert by_error == {None, CUT_OFF, "not finished when the run ended"}
    assert all(record.num_output_tokens == len(record.token_times_s) for record in load.records)


def test_counters_are_read_at_both_ends(drive: Any) -> None:
    server = token_server.TokenServer(token_server.steady(0.9, 0.1))
    load = drive(server, Workload(offline=[offline(i, 2) for i in range(99)], in_flight=1))
    start, end = load.counters_start, load.counters_end
    names = {"conserve:stopped_steps_total", "vllm:prompt_tokens_total"}
    assert set(start) == set(end) == names
    assert end["conserve:stopped_steps_total"] - start["conserve:stopped_steps_total"] == 20


def test_warm_up_says_what_failed(in_virtual_time: Any, connect: Any) -> None:
    async def main(server: Any) -> None:
        async with connect(server) as http:
            await LoadClient(http, body).ask([online(0, 0.0), offline(1)])

    good = token_server.TokenServer(token_server.steady(0.5, 0.5))
    in_virtual_time(main(good))
    assert len(good.seen) == 2
    with pytest.raises(RuntimeError, match="2 of 2 requests failed: HTTP 500"):
        in_virtual_time(main(token_server.TokenServer(token_server.steady(0, 0), status=500)))


def talk(num_turns: int, pause_s: float = 2.0) -> Workload:
    """One conversation of turns of 10 own tokens and 4 of answer."""
    plans = [
        RequestPlan(
            f"online-0-turn-{i}",
            True,
            -3.0,
            14 * i + 10,
            4,
            session="online-0",
            num_history_tokens=14 * i,
            pause_s=pause_s if i else 0.0,
        )
        for i in range(num_turns)
    ]
    following = {a.request_id: b for a, b in pairwise(plans)}
    return Workload(online=plans[:1], next_turns=following)


def own_words(plan: RequestPlan) -> dict[str, Any]:
    num_own = plan.num_prompt_tokens - plan.num_history_tokens
    return {
        "id": plan.request_id,
        "prompt": [plan.num_prompt_tokens] * num_own,
        "max_tokens": plan.num_output_tokens,
    }


def test_a_turn_comes_a_pause_after_the_answer_and_says_what_was_said(drive: Any) -> None:
    server = token_server.TokenServer(token_server.steady(0.5, 0.1))
    load = drive(server, talk(3), body=own_words)
    assert [record.error for record in load.records] == [None] * 3
    assert [record.arrival_s for record in load.records] == pytest.approx([-3.0, -0.2, 2.6])
    prompts = [request["prompt"] for _, request in server.seen]
    answer = [token_server.ANSWER] * 4
    assert prompts[0] == [10] * 10
    assert prompts[1] == [*prompts[0], *answer, *[24] * 10]
    assert prompts[2] == [*prompts[1], *answer, *[38] * 10]


def test_no_turn_is_sent_after_the_window(drive: Any) -> None:
    server = token_server.TokenServer(token_server.steady(0.5, 0.1))
    load = drive(server, talk(99), body=own_words)
    arrivals = [record.arrival_s for record in load.records]
    assert arrivals == pytest.approx([-3.0 + 2.8 * i for i in range(9)])
    assert all(record.finished for record in load.records)


def test_a_failed_turn_ends_its_conversation(drive: Any) -> None:
    server = token_server.TokenServer(token_server.steady(0.5, 0.1), break_off=True)
    (record,) = drive(server, talk(3), body=own_words).records
    assert record.failed


def test_an_answer_whose_tokens_the_server_keeps_to_itself_is_a_failure(drive: Any) -> None:
    server = token_server.TokenServer(token_server.steady(0.5, 0.1), tells_tokens=False)
    first, second = drive(server, talk(3), body=own_words).records
    assert first.finished
    assert second.error == "(20, 4) prompt and output tokens, not (24, 4)"


def test_what_the_server_had_cached_is_kept(drive: Any) -> None:
    server = token_server.TokenServer(token_server.steady(0.5, 0.1), num_cached_tokens=7)
    load = drive(server, Workload(online=[online(0, 1.0)]))
    assert load.records[0].num_cached_tokens == 7
    silent = token_server.TokenServer(token_server.steady(0.5, 0.1))
    load = drive(silent, Workload(online=[online(0, 1.0)]))
    assert load.records[0].num_cached_tokens is None
