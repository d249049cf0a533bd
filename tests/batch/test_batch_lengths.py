"""What a batch is expected to take: by its own lines, and by its owner's batches before."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from conserve.batch.deadlines import ESTIMATE_LINES, view_of
from conserve.batch.executor import Reply
from conserve.batch.lifecycle import Status
from conserve.batch.outcome import keep_reply
from conserve.batch.records import LiveBatch
from conserve.batch.rules import Rules
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from conserve.batch.validation import BYTES_PER_TOKEN, validate
from tests.batch.batch_fakes import FakeModel, eventually, running
from tests.batch.builders import CHAT, TENANT, jsonl, line, numbered
from tests.batch.test_batch_contract import BYTES, MANY, batch_in_progress

pytestmark = pytest.mark.anyio

LIVE = LiveBatch(
    id="b",
    tenant=TENANT,
    created_at=0.0,
    priority=10,
    expires_at=1e6,
    model="fake",
    status=Status.IN_PROGRESS,
    expiring=False,
    estimated_tokens=100_000,
    total=1000,
    completed=0,
    failed=0,
    input_tokens=0,
    output_tokens=0,
    paused_at=None,
)


def left_after(num_done: int, tokens_each: int) -> float:
    done = replace(LIVE, completed=num_done, output_tokens=num_done * tokens_each)
    return view_of(done).line_tokens


def test_a_batchs_own_lines_count_from_the_first_on() -> None:
    found = [left_after(n, 10) for n in (0, 1, ESTIMATE_LINES, 900)]
    assert found[0] == 100.0
    assert found == sorted(found, reverse=True)
    assert 90 < found[1] < 100
    assert found[2] == 55.0
    assert found[3] < 15


@pytest.mark.parametrize(
    ("asked", "mean", "expected"),
    [(None, None, 256), (1000, None, 1000), (None, 40.2, 41), (1000, 40.2, 41), (7, 40.2, 7)],
)
def test_a_line_takes_what_lines_like_it_took(
    asked: int | None, mean: float | None, expected: int
) -> None:
    content = jsonl([line("a", body={} if asked is None else {"max_tokens": asked})])
    plain = validate([content], Rules(CHAT, default_output_tokens=0, mean_output_tokens=0.0))
    found = validate([content], Rules(CHAT, mean_output_tokens=mean))
    assert found.estimated_tokens - plain.estimated_tokens == expected


@pytest.mark.parametrize(
    ("asked", "mean", "expected"), [(None, 40.2, 41), (30, 40.2, 41), (7, 40.2, 28), (7, None, 28)]
)
def test_the_mean_of_lines_is_of_all_their_completions(
    asked: int | None, mean: float | None, expected: int
) -> None:
    fields = {"n": 4} | ({} if asked is None else {"max_tokens": asked})
    content = jsonl([line("a", body=fields)])
    plain = validate([content], Rules(CHAT, default_output_tokens=0, mean_output_tokens=0.0))
    found = validate([content], Rules(CHAT, mean_output_tokens=mean))
    assert found.estimated_tokens - plain.estimated_tokens == expected


async def end_lines(stores: Stores, batch_id: str, output_tokens: int) -> None:
    """All of a batch's lines, with so many tokens each."""
    worker = f"w-{batch_id}"
    await stores.workers.enlist(worker)
    claimed = await stores.leases.claim(worker, batch_id, MANY, BYTES, MANY)
    usage = b'{"usage":{"prompt_tokens":3,"completion_tokens":%d}}' % output_tokens
    await stores.leases.record(worker, [keep_reply(each, Reply(200, usage)) for each in claimed])
    await stores.workers.retire(worker)


async def test_lengths_are_of_the_owners_own_kind_of_batch(stores: Stores) -> None:
    expected = stores.lengths.expected
    assert await expected(TENANT, CHAT, "fake") is None
    first, second = [await batch_in_progress(stores, 10) for _ in range(2)]
    theirs = await batch_in_progress(stores, 30, tenant="another")
    await end_lines(stores, first, 30)
    assert await expected(TENANT, CHAT, "fake") is None  # too few to tell
    await end_lines(stores, second, 50)
    await end_lines(stores, theirs, 999)
    assert await expected(TENANT, CHAT, "fake") == 40.0
    assert await expected("another", CHAT, "fake") == 999.0
    assert await expected(TENANT, CHAT, "other") is None
    assert await expected(TENANT, "/v1/completions", "fake") is None
    assert await expected(TENANT, "/v1/embeddings", "fake") == 0.0


async def test_the_next_batch_is_estimated_by_the_last(settings: BatchSettings) -> None:
    model = FakeModel()
    async with running(settings, model) as run:
        views = run.service.stores.batches.views
        await run.until((await run.submit(numbered(30))).id, "completed")
        model.open.clear()
        content = jsonl([line(f"long-{n}", body={"max_tokens": 4000}) for n in range(5)])
        await run.submit(content)
        await eventually(lambda: model.running == 5)
        (view,) = await views()
        model.open.set()
    # The fake answers with 2 tokens.
    assert view.remaining_tokens <= len(content) / BYTES_PER_TOKEN + 5 * 2
