"""A file's content as clients fetch it: whole, resumed, and in pieces."""

from __future__ import annotations

import pytest

from conserve.batch.settings import BatchSettings
from tests.batch.batch_fakes import running
from tests.batch.builders import numbered

pytestmark = pytest.mark.anyio

CONTENT = numbered(700)
SIZE = len(CONTENT)
LATE = 70_000
"""Beyond the first piece that the storage reads."""


@pytest.fixture
def settings(settings: BatchSettings) -> BatchSettings:
    assert SIZE > LATE + 10
    return settings


async def test_content_names_its_size_charset_and_name(settings: BatchSettings) -> None:
    async with running(settings) as run:
        whole = await run.http.get(f"/v1/files/{await run.upload(CONTENT)}/content")
    assert (whole.status_code, whole.content) == (200, CONTENT)
    assert whole.headers["content-type"] == "application/octet-stream; charset=utf-8"
    assert whole.headers["content-length"] == str(SIZE)
    assert whole.headers["accept-ranges"] == "bytes"
    assert whole.headers["x-content-type-options"] == "nosniff"
    assert "input.jsonl" in whole.headers["content-disposition"]


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=5-9", 5, 9),
        (f"bytes={LATE}-{LATE + 9}", LATE, LATE + 9),
        (f"bytes=5-{LATE}", 5, LATE),
        ("bytes=5-", 5, SIZE - 1),
        ("Bytes= 5 - ", 5, SIZE - 1),
        (f"bytes=5-{SIZE + 9}", 5, SIZE - 1),
        ("bytes=-5", SIZE - 5, SIZE - 1),
        (f"bytes=-{SIZE + 9}", 0, SIZE - 1),
    ],
)
async def test_one_range_is_answered_with_it(
    settings: BatchSettings, asked: str, first: int, last: int
) -> None:
    async with running(settings) as run:
        path = f"/v1/files/{await run.upload(CONTENT)}/content"
        part = await run.http.get(path, headers={"range": asked})
    assert (part.status_code, part.content) == (206, CONTENT[first : last + 1])
    assert part.headers["content-range"] == f"bytes {first}-{last}/{SIZE}"
    assert part.headers["content-length"] == str(last - first + 1)


@pytest.mark.parametrize("asked", [f"bytes={SIZE}-", "bytes=9-5", "bytes=-0", f"bytes={SIZE}-9"])
async def test_a_range_without_bytes_is_refused(settings: BatchSettings, asked: str) -> None:
    async with running(settings) as run:
        path = f"/v1/files/{await run.upload(CONTENT)}/content"
        refused = await run.http.get(path, headers={"range": asked})
    assert refused.status_code == 416
    assert refused.headers["content-range"] == f"bytes */{SIZE}"
    assert refused.json()["error"]["code"] == "range_not_satisfiable"


@pytest.mark.parametrize("asked", ["bytes=a-b", "bytes=-", "bytes=", "lines=1-2", "bytes=0-1,5-6"])
async def test_what_is_no_one_range_is_ignored(settings: BatchSettings, asked: str) -> None:
    async with running(settings) as run:
        path = f"/v1/files/{await run.upload(CONTENT)}/content"
        whole = await run.http.get(path, headers={"range": asked})
    assert (whole.status_code, whole.content) == (200, CONTENT)


async def test_a_download_goes_on_only_where_the_file_is_the_same(settings: BatchSettings) -> None:
    async with running(settings) as run:
        path = f"/v1/files/{await run.upload(CONTENT)}/content"
        etag = (await run.http.get(path)).headers["etag"]
        rest = {"range": f"bytes={LATE}-"}
        same = await run.http.get(path, headers={**rest, "if-range": etag})
        other = await run.http.get(path, headers={**rest, "if-range": '"other"'})
    assert (same.status_code, same.content) == (206, CONTENT[LATE:])
    assert (other.status_code, other.content) == (200, CONTENT)
