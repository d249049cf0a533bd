"""Clients that lose nothing themselves: they try again until their request has been answered."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx

from tests.stops.tiny_llama import random_text

STUCK_S = 300.0
"""Without an answer, with however many tries, somebody waits for ever."""
MODEL = "tiny"
NUM_PROMPTS, LINES = 48, 40
TERMINAL = ("completed", "failed", "expired", "cancelled")


class Answers:
    """What was answered to which prompt: the same is always answered to the same, greedily."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        self.bodies = [
            {
                "model": MODEL,
                "prompt": random_text(chance, chance.randrange(30, 900)),
                "max_tokens": chance.randrange(4, 40),
                "temperature": 0,
                "ignore_eos": True,
            }
            for _ in range(NUM_PROMPTS)
        ]
        self._texts: dict[int, str] = {}
        self.differing: list[int] = []

    def take(self, number: int, text: str) -> None:
        if self._texts.setdefault(number, text) != text:
            self.differing.append(number)


class Client:
    """One of several, each in a thread. What came of its requests is in `counts`."""

    def __init__(self, url: str, answers: Answers, seed: int, over: threading.Event) -> None:
        self.counts: Counter[str] = Counter()
        self._url, self._answers, self._over = url, answers, over
        self._chance = random.Random(seed)

    def _ask(self, method: str, path: str, **how: Any) -> httpx.Response:
        """Until the server has answered it: what it says of itself (429, 5xx) is no answer."""
        deadline = time.monotonic() + STUCK_S
        while time.monotonic() < deadline:
            try:
                reply = httpx.request(method, f"{self._url}{path}", timeout=60, **how)
            except httpx.TransportError as error:
                self.counts[type(error).__name__] += 1
            else:
                if reply.status_code < 500 and reply.status_code != 429:
                    return reply
                self.counts[f"answered {reply.status_code}"] += 1
            time.sleep(0.5)
        raise AssertionError(f"{method} {path} has no answer for {STUCK_S:g} s: {self.counts}")

    def repeat(self, act: Callable[[], None], longest_pause_s: float) -> Counter[str]:
        while not self._over.is_set():
            act()
            time.sleep(self._chance.random() * longest_pause_s)
        return self.counts

    def chat(self) -> None:
        self._answered("default")

    def harvest(self) -> None:
        self._answered("flex")

    def _answered(self, tier: str) -> None:
        number = self._chance.randrange(NUM_PROMPTS)
        body = self._answers.bodies[number] | {"service_tier": tier}
        while True:
            reply = self._ask("POST", "/v1/completions", json=body)
            assert reply.status_code == 200, reply.text
            (choice,) = reply.json()["choices"]
            if choice["finish_reason"] == "length":
                break
            self.counts[f"{tier} cut short"] += 1  # a pause that aborts
        self._answers.take(number, choice["text"])
        self.counts[f"{tier} answered"] += 1

    def batch(self) -> None:
        """One from its upload to the last line of its output: every line once, none failed."""
        numbers = [self._chance.randrange(NUM_PROMPTS) for _ in range(LINES)]
        batch = self._until_terminal(self._submit(numbers)["id"])
        assert batch["status"] == "completed", batch
        assert batch["request_counts"] == {"total": LINES, "completed": LINES, "failed": 0}, batch
        output = self._ask("GET", f"/v1/files/{batch['output_file_id']}/content").text
        lines = [json.loads(line) for line in output.splitlines()]
        assert sorted(int(line["custom_id"]) for line in lines) == list(range(LINES))
        for line in lines:
            number = numbers[int(line["custom_id"])]
            self._answers.take(number, line["response"]["body"]["choices"][0]["text"])
        self.counts["batches"] += 1
        self.counts["lines"] += LINES

    def _submit(self, numbers: list[int]) -> Any:
        url = "/v1/completions"
        text = "\n".join(
            json.dumps(
                {"custom_id": str(i), "method": "POST", "url": url, "body": self._body(number)}
            )
            for i, number in enumerate(numbers)
        )
        upload: dict[str, Any] = {"files": {"file": ("soak.jsonl", text)}}
        file = self._ask("POST", "/v1/files", data={"purpose": "batch"}, **upload).json()
        wanted = {"input_file_id": file["id"], "endpoint": url, "completion_window": "24h"}
        reply = self._ask("POST", "/v1/batches", json=wanted)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def _body(self, number: int) -> dict[str, Any]:
        return self._answers.bodies[number]

    def _until_terminal(self, batch_id: str) -> Any:
        """However long it takes, as long as it gets on."""
        done, since_s = -1, time.monotonic()
        while True:
            batch = self._ask("GET", f"/v1/batches/{batch_id}").json()
            if batch["status"] in TERMINAL:
                return batch
            if batch["request_counts"]["completed"] > done:
                done, since_s = batch["request_counts"]["completed"], time.monotonic()
            assert time.monotonic() - since_s < 2 * STUCK_S, f"stuck: {batch}"
            time.sleep(1.0)
