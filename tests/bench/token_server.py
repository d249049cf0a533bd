"""An ASGI app that emits tokens on a schedule, as vLLM's /v1/completions streams them; chats are
prompts of as many tokens as words.

Also a program: `python token_server.py PORT [DIE_AFTER]` serves it with uvicorn, and ends itself
without a word to anybody after DIE_AFTER completions. With `--data-dir FOLDER` as the last two
words it serves batches, too.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

Body = dict[str, Any]
ANSWER = 5
"""Every token of an answer."""
Schedule = Callable[[Body], Iterable[tuple[float, int]]]
"""(seconds since the message before, tokens in the message) of each message of an answer; a
generator may look at the server as it is at each of them."""


def steady(first_s: float, gap_s: float) -> Schedule:
    def schedule(body: Body) -> list[tuple[float, int]]:
        return [(first_s, 1)] + [(gap_s, 1)] * (body["max_tokens"] - 1)

    return schedule


@dataclass
class TokenServer:
    """seen: (time, body) of each request. running: how many are being answered, at each change."""

    schedule: Schedule
    status: int = 200
    break_off: bool = False
    complain: bool = False
    extra_prompt_tokens: int = 0
    tells_tokens: bool = True
    num_cached_tokens: int | None = None
    die_after: int | None = None
    seen: list[tuple[float, Body]] = field(default_factory=list)
    running: list[tuple[float, int]] = field(default_factory=list)
    num_done: int = 0
    num_prompt_tokens: int = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        answers = {"/health": self._health, "/metrics": self._metrics, "/v1/models": self._models}
        await answers.get(scope["path"], self._complete)(receive, send)

    async def _health(self, receive: Any, send: Any) -> None:
        await _respond(send, 200, b"")

    async def _models(self, receive: Any, send: Any) -> None:
        await _respond(send, 404, b"")

    async def _metrics(self, receive: Any, send: Any) -> None:
        text = (
            "# TYPE conserve:stopped_steps counter\n"
            f'conserve:stopped_steps_total{{engine="0"}} {self.num_done}\n'
            "# TYPE other counter\nother_total 7\n"
            "# TYPE vllm:prompt_tokens counter\n"
            f"vllm:prompt_tokens_total {self.num_prompt_tokens}\n"
        )
        await _respond(send, 200, text.encode())

    async def _complete(self, receive: Any, send: Any) -> None:
        body = json.loads((await receive())["body"])
        if messages := body.get("messages"):
            body["prompt"] = messages[0]["content"].split()
        self.seen.append((_now_s(), body))
        if self.status != 200:
            await _respond(send, self.status, b'{"error": {"message": "no"}}')
            return
        self._change(+1)
        self.num_prompt_tokens += len(body["prompt"])
        try:
            await (self._stream if body.get("stream") else self._answer)(body, send)
        finally:
            self._change(-1)

    def _change(self, by: int) -> None:
        before = self.running[-1][1] if self.running else 0
        self.running.append((_now_s(), before + by))

    async def _answer(self, body: Body, send: Any) -> None:
        await asyncio.sleep(sum(delay_s for delay_s, _ in self.schedule(body)))
        self.num_done += 1
        await _respond(send, 200, self._message(body, body["max_tokens"]).encode())

    async def _stream(self, body: Body, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        num_tokens = 0
        for delay_s, count in self.schedule(body):
            await asyncio.sleep(delay_s)
            num_tokens += count
            await _event(send, self._message(body, num_tokens, count))
            if self.break_off:
                break
        else:
            if self.complain:
                await _event(send, json.dumps({"error": {"message": "out of memory"}}))
            self.num_done += 1
            await _event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        if self.die_after is not None and self.num_done >= self.die_after:
            os._exit(3)

    def _message(self, body: Body, num_tokens: int, num_fresh: int = 0) -> str:
        prompt_tokens = len(body["prompt"]) + self.extra_prompt_tokens
        usage: Body = {"prompt_tokens": prompt_tokens, "completion_tokens": num_tokens}
        if self.num_cached_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.num_cached_tokens}
        choice: Body = {"delta": {"content": "x "}} if "messages" in body else {"text": "x"}
        if body.get("return_token_ids") and self.tells_tokens:
            choice["token_ids"] = [ANSWER] * num_fresh
        return json.dumps({"choices": [choice], "usage": usage})


def _now_s() -> float:
    return asyncio.get_running_loop().time()


async def _event(send: Any, data: str) -> None:
    message = {"type": "http.response.body", "body": f"data: {data}\n\n".encode()}
    await send({**message, "more_body": True})


async def _respond(send: Any, status: int, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def with_batches(app: TokenServer, data_dir: str) -> Any:
    """The same server behind the routes of files and batches."""
    from fastapi import FastAPI

    from conserve.batch.executor import asgi_executor
    from conserve.batch.settings import BatchSettings
    from conserve.server.batches.routes import batch_service

    settings, executor = BatchSettings(data_dir=Path(data_dir)), asgi_executor(app)

    @asynccontextmanager
    async def lifespan(one: FastAPI) -> AsyncIterator[None]:
        async with batch_service(settings, one, executor):
            yield

    batches = FastAPI(lifespan=lifespan)

    async def either(scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "/v1/batches")  # none at start and end
        ours = path.startswith(("/v1/files", "/v1/batches"))
        await (batches if ours else app)(scope, receive, send)

    return either


if __name__ == "__main__":
    import uvicorn

    place = sys.argv[-1] if sys.argv[-2] == "--data-dir" else None
    dies = int(sys.argv[2]) if len(sys.argv) == 3 else None
    sys.stdout.write("the fake server begins\n")
    sys.stdout.flush()
    app = TokenServer(steady(0.01, 0.002), die_after=dies)
    serve = partial(uvicorn.run, port=int(sys.argv[1]), log_level="warning")
    if place is None:
        serve(app, lifespan="off")
    else:
        serve(with_batches(app, place))
