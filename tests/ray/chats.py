"""Chats one after the other, each timed, until told to stop."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

NUM_TOKENS = 8
BODY = {
    "model": "tiny",
    "prompt": [3, 4, 5],
    "max_tokens": NUM_TOKENS,
    "ignore_eos": True,
    "temperature": 0,
    "stream": True,
}


@dataclass
class Chat:
    """One of them. `token_times_s` are on the clock of `time.monotonic`."""

    began_s: float
    replica: str | None = None
    """Who answered; None where nobody did."""
    token_times_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    error: str | None = None

    @property
    def worst_wait_s(self) -> float:
        """The longest of the time to the first token and the gaps after it."""
        times = [self.began_s, *self.token_times_s]
        return max(after - before for before, after in pairwise(times))


class Chats:
    """A context manager; `made` are those that have ended."""

    def __init__(self, url: str) -> None:
        self.made: list[Chat] = []
        self._url = url
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._chat)

    def __enter__(self) -> Chats:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _chat(self) -> None:
        with httpx.Client(base_url=self._url, timeout=120, trust_env=False) as client:
            while not self._over.is_set():
                chat = Chat(time.monotonic())
                try:
                    _ask(client, chat)
                except httpx.HTTPError as error:
                    chat.error = repr(error)
                chat.ended_s = time.monotonic()
                self.made.append(chat)


def _ask(client: httpx.Client, chat: Chat) -> None:
    """vLLM puts tokens that wait for a slow reader into one event: its end says if all came."""
    with client.stream("POST", "/v1/completions", json=BODY) as response:
        chat.replica = response.headers.get("x-conserve-replica")
        chat.error = "the stream broke off"
        if response.status_code != 200:
            chat.error = f"{response.status_code}: {response.read().decode()}"
            return
        for event in response.iter_lines():
            if event.startswith("data: {"):
                _take(json.loads(event.removeprefix("data: ")), chat)


def _take(event: dict[str, Any], chat: Chat) -> None:
    if "error" in event:
        chat.error = str(event["error"])
        return
    chat.token_times_s.append(time.monotonic())
    if event["choices"][0]["finish_reason"] == "length":
        chat.error = None
