"""Measures how fast a server is, over HTTP and with nothing else on it, in seconds.

Each figure is taken from requests just large enough to be timed, so that it takes about as long on
a machine twenty times slower.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator

from conserve.batch.connection import async_client_for
from conserve.bench.client import LoadClient
from conserve.bench.prompts import body_of
from conserve.bench.scale import NUM_STREAMS, Speed
from conserve.metrics import RequestRecord
from conserve.workload import RequestPlan

ENOUGH_S = 0.5
"""A request that takes this long is timed well enough."""
PROMPT_SIZES = (32, 128, 512)
ANSWER_SIZES = (8, 32)
SHORT_PROMPT = 4
ROUNDS = 2
"""The best of these counts: a disturbance makes a server slower, never faster."""
MOST_OVER_WHOLE = 2.0
"""What is found while all answers run is at most so many times what they make from their first
request to their last token: tokens that pile up on their way come at any speed."""
LIMIT_S = 600.0
"""For all of it: a server this slow is one that hangs."""

Records = list[RequestRecord]
Timed = tuple[int, float]
"""Tokens, and the seconds they took."""


class SpeedError(RuntimeError):
    """The machine's speed could not be measured; the message says why."""


async def speed_of(url: str, tokenizer: str, model: str) -> Speed:
    """Of the idle server at `url`, which serves `model`. Raises SpeedError."""
    async with async_client_for(url, base_url=url, timeout=None) as http:
        return await measure(LoadClient(http, body_of(tokenizer, model, "speed")))


async def measure(client: LoadClient) -> Speed:
    """What the idle server behind `client` computes. Raises SpeedError when a request fails, or
    all of it takes LIMIT_S."""
    try:
        async with asyncio.timeout(LIMIT_S):
            return await _measure(client, _numbered())
    except TimeoutError:
        reason = f"the server answered next to nothing in {LIMIT_S:.0f} s"
    except RuntimeError as error:
        reason = str(error)
    raise SpeedError(f"the machine's speed was not measured: {reason}")


async def _measure(client: LoadClient, ids: Iterator[str]) -> Speed:
    async def answers(count: int, num_prompt_tokens: int, num_output_tokens: int) -> Records:
        plans = [
            RequestPlan(next(ids), True, 0.0, num_prompt_tokens, num_output_tokens)
            for _ in range(count)
        ]
        return await client.ask(plans)

    async def prefill(size: int) -> Timed:
        (record,) = await answers(1, size, 1)
        return size, record.token_times_s[0] - record.arrival_s

    async def decode(count: int, size: int) -> Timed:
        return _while_all_run(await answers(count, SHORT_PROMPT, size + 1))

    # The first requests of a server are slow: kernels are chosen, pools are made.
    await answers(2, PROMPT_SIZES[0], 2)
    return Speed(
        await _best_tps(prefill, PROMPT_SIZES),
        await _best_tps(lambda size: decode(1, size), ANSWER_SIZES),
        await _best_tps(lambda size: decode(NUM_STREAMS, size), ANSWER_SIZES),
    )


async def _best_tps(timed: Callable[[int], Awaitable[Timed]], sizes: tuple[int, ...]) -> float:
    """Tokens a second at the first size that takes ENOUGH_S, or the last."""
    for size in sizes:
        first = await timed(size)
        if first[1] >= ENOUGH_S or size == sizes[-1]:
            break
    rounds = [first, *[await timed(size) for _ in range(ROUNDS - 1)]]
    return max(num_tokens / max(seconds, 1e-6) for num_tokens, seconds in rounds)


def _while_all_run(records: Records) -> Timed:
    """Tokens between the last answer's first token and the first answer's last: neither the
    prompts nor a smaller batch are in it. Where there is no such time, all tokens but the first.
    Bounded by MOST_OVER_WHOLE."""
    start_s = max(record.token_times_s[0] for record in records)
    end_s = min(record.token_times_s[-1] for record in records)
    times = [at_s for record in records for at_s in record.token_times_s]
    whole_s = max(times) - min(record.arrival_s for record in records)
    num_tokens, seconds = len(times) - 1, max(times) - min(times)
    if end_s > start_s:
        num_tokens, seconds = sum(start_s < at_s <= end_s for at_s in times), end_s - start_s
    return num_tokens, max(seconds, num_tokens / len(times) * whole_s / MOST_OVER_WHOLE)


def _numbered() -> Iterator[str]:
    return (f"speed-{i}" for i in itertools.count())
