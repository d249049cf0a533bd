"""From leased lines to the requests that run them, read from their file."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import msgspec

from conserve.batch.batch_store import BatchStore
from conserve.batch.contents import FileContents
from conserve.batch.outcome import Result, engine_id, failure, offline_body
from conserve.batch.records import Line

RESPONSES = "/v1/responses"


@dataclass(frozen=True)
class Request:
    """A line with all it takes to run it."""

    line: Line
    endpoint: str
    body: bytes


class RequestReader:
    """Lines may be long, so they are read and rewritten in threads."""

    def __init__(self, batches: BatchStore, contents: FileContents) -> None:
        self._batches = batches
        self._contents = contents

    async def read(self, lines: list[Line], priority: int) -> list[Request | Result]:
        """What each line asks for, or the failure of one that is no longer what was validated;
        nothing where the batch is deleted, and the lines with it, or for no lines. All are of one
        batch.

        Raises FileNotFoundError: the input file is gone; StoreUnavailableError.
        """
        source = await self._batches.source(lines[0].batch_id) if lines else None
        if source is None:
            return []
        file_id, endpoint = source
        spans = [(line.offset, line.length) for line in lines]
        texts = await self._contents.ranges(file_id, spans)
        return await asyncio.to_thread(_requests, lines, texts, endpoint, priority)


def _requests(
    lines: list[Line], texts: list[bytes], endpoint: str, priority: int
) -> list[Request | Result]:
    requests: list[Request | Result] = []
    for line, text in zip(lines, texts, strict=True):
        name = f"resp_{engine_id(line)}" if endpoint == RESPONSES else None
        try:
            requests.append(Request(line, endpoint, offline_body(text, priority, name)))
        except (msgspec.DecodeError, RecursionError) as error:
            requests.append(failure(line, "invalid_json_line", str(error)))
    return requests
