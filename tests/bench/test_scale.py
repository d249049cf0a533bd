"""A machine's speed: measured in virtual time on servers of several speeds, and as one number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from conserve.bench.client import LoadClient
from conserve.bench.scale import LEAST, MOST, REFERENCE, Speed, scale_of
from conserve.bench.speed import LIMIT_S, SpeedError, measure
from conserve.workload import RequestPlan
from tests.bench.token_server import Body, TokenServer

SLOW = Speed(84.0, 8.0, 36.0)
"""A processor without bfloat16 instructions that multiplies it all the same."""
LAPTOP = Speed(500.0, 20.0, 73.0)
FAST = Speed(24_000.0, 200.0, 2_500.0)


def server_of(speed: Speed) -> TokenServer:
    """Prompts wait for each other; every running answer makes the steps of all slower."""

    def steps(body: Body) -> Iterator[tuple[float, int]]:
        yield server.running[-1][1] * len(body["prompt"]) / speed.prefill_tps, 1
        for _ in range(body["max_tokens"] - 1):
            yield speed.step_s(server.running[-1][1]), 1

    server = TokenServer(steps)
    return server


def body_of(plan: RequestPlan) -> dict[str, Any]:
    return {"prompt": [1] * plan.num_prompt_tokens, "max_tokens": plan.num_output_tokens}


@pytest.fixture
def measured(in_virtual_time: Any, connect: Any) -> Any:
    """The speed found of a server, and the seconds that finding it took."""

    async def main(server: TokenServer) -> tuple[Speed, float]:
        async with connect(server) as http:
            client = LoadClient(http, body_of)
            return await measure(client), client._now_s()

    return lambda server: in_virtual_time(main(server))


@pytest.mark.parametrize("true", [SLOW, LAPTOP, REFERENCE, FAST])
def test_a_server_s_speed_is_found_in_seconds(measured: Any, true: Speed) -> None:
    found, seconds = measured(server_of(true))
    assert found.prefill_tps == pytest.approx(true.prefill_tps, rel=0.01)
    assert found.stream_tps == pytest.approx(true.stream_tps, rel=0.01)
    assert found.batch_tps == pytest.approx(true.batch_tps, rel=0.1)
    assert scale_of(found) == pytest.approx(scale_of(true), rel=0.1)
    assert seconds < 30


def test_tokens_that_pile_up_on_their_way_make_no_server_fast(measured: Any) -> None:
    """They are computed one after the other, and all reach the client when the last is there."""

    def steps(body: Body) -> Iterator[tuple[float, int]]:
        tokens = body["max_tokens"]
        yield len(body["prompt"]) / REFERENCE.prefill_tps + (tokens - 1) / 20, 1
        for _ in range(tokens - 1):
            yield 1e-6, 1

    found, _ = measured(TokenServer(steps))
    assert found.stream_tps < 3 * 20
    assert found.batch_tps < 3 * 16 * 20


def test_a_server_that_fails_or_hangs_says_so(measured: Any) -> None:
    with pytest.raises(SpeedError, match="not measured: 2 of 2 requests failed: HTTP 500"):
        measured(TokenServer(lambda _: [], status=500))
    with pytest.raises(SpeedError, match=f"next to nothing in {LIMIT_S:.0f} s"):
        measured(TokenServer(lambda _: [(1e6, 1)]))


@pytest.mark.parametrize(("speed", "scale"), [(SLOW, 0.038), (LAPTOP, 0.19), (REFERENCE, 1.0)])
def test_the_scale_is_what_a_summary_takes(speed: Speed, scale: float) -> None:
    assert scale_of(speed) == scale


@pytest.mark.parametrize(("factor", "scale"), [(0.82, 1.0), (1.22, 1.0), (0.75, 0.75), (1.4, 1.4)])
def test_a_machine_about_as_fast_has_scale_1(factor: float, scale: float) -> None:
    fields = (REFERENCE.prefill_tps, REFERENCE.stream_tps, REFERENCE.batch_tps)
    assert scale_of(Speed(*(factor * field for field in fields))) == scale


def test_scales_end_where_nothing_would_be_measured() -> None:
    assert scale_of(Speed(1e9, 1e9, 1e9)) == MOST
    assert scale_of(Speed(0.1, 0.1, 0.1)) == LEAST


def test_a_step_of_some_answers_lies_between_one_and_all() -> None:
    assert LAPTOP.step_s(1) == pytest.approx(1 / 20)
    assert LAPTOP.step_s(16) == pytest.approx(16 / 73)
    assert LAPTOP.step_s(1) < LAPTOP.step_s(6) < LAPTOP.step_s(16)
