"""Ray Data: map a data set over a server, as offline work.

Each of Ray's tasks sends the rows of its block at once; how many run together is up to Ray, and
how fast they go up to what chat leaves.

Needs a server (`conserve serve`) and `pip install 'ray[data]' openai`.
Run: python examples/ray_map.py
CONSERVE_URL is the server, http://127.0.0.1:8000 if unset; OPENAI_API_KEY its key, if it has one.
"""

import asyncio
import os
from typing import Any

import ray
from openai import AsyncOpenAI, OpenAI

URL = os.environ.get("CONSERVE_URL", "http://127.0.0.1:8000") + "/v1"
KEY = os.environ.get("OPENAI_API_KEY", "none")
Columns = dict[str, Any]


class Summarise:
    """One per worker of Ray's: its client lives as long as the worker does."""

    def __init__(self, model: str) -> None:
        self.model = model

    def __call__(self, rows: Columns) -> Columns:
        return {**rows, "summary": asyncio.run(self.answers(rows["text"]))}

    async def answers(self, texts: list[str]) -> list[str]:
        async with AsyncOpenAI(base_url=URL, api_key=KEY, timeout=None) as client:
            return await asyncio.gather(*(self.answer(client, text) for text in texts))

    async def answer(self, client: AsyncOpenAI, text: str) -> str:
        reply = await client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": f"Summarise in a few words: {text}"}],
            max_tokens=16,
            service_tier="flex",
        )
        return reply.choices[0].message.content or ""


def main() -> None:
    model = OpenAI(base_url=URL, api_key=KEY).models.list().data[0].id
    texts = ray.data.from_items([{"text": f"Report {n}: all is well."} for n in range(8)])
    rows = texts.map_batches(
        Summarise, fn_constructor_args=(model,), concurrency=2, num_cpus=0.1, batch_size=4
    ).take_all()
    for row in rows:
        print(f"{row['text']} -> {row['summary']!r}")
    print(f"{len(rows)} rows")


if __name__ == "__main__":
    ray.init(include_dashboard=False, log_to_driver=False)
    main()
