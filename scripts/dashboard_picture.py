"""Draw docs/images/dashboard.png: the live page of a server under bursts of chat and two batches.

    python scripts/dashboard_picture.py [URL] [--seconds 125] [--out FOLDER]

URL is a running `conserve serve` on the default model with nothing else to do; without one it is
started. Leaves dashboard.png (light), dashboard-dark.png and dashboard-narrow.png in FOLDER.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
from playwright.async_api import ViewportSize, async_playwright

from conserve.batch.connection import async_client_for
from conserve.bench.ports import free_port
from conserve.bench.server import Server

ROOT = Path(__file__).parents[1]
MODEL = "SmolLM2-135M-Instruct"
CHAT = "/v1/chat/completions"
BURST = 6
BATCHES = (("Nightly summaries", 260, "2h"), ("Label support tickets", 120, "6h"))
PICTURES: tuple[tuple[str, Literal["light", "dark"], int, int], ...] = (
    ("dashboard", "light", 1440, 1000),
    ("dashboard-dark", "dark", 1440, 1000),
    ("dashboard-narrow", "light", 390, 844),
)
WORDS = (ROOT / "docs" / "batches.md").read_text().split()
START_LIMIT_S = 300.0
SERVE = "from conserve.cli.main import main; main()"


@contextmanager
def serving() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as data:
        port = free_port()
        flags = ["--host", "127.0.0.1", "--port", str(port), "--data-dir", data]
        command = [sys.executable, "-c", SERVE, "serve", *flags]
        with Server(command, {}, port, Path(data) / "server.log") as server:
            server.wait_until_healthy(START_LIMIT_S)
            yield server.base_url


def request(chance: random.Random, num_words: int, max_tokens: int) -> dict[str, Any]:
    start = chance.randrange(len(WORDS) - num_words)
    text = "Summarise: " + " ".join(WORDS[start : start + num_words])
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "max_tokens": max_tokens}


async def start_batches(client: httpx.AsyncClient, chance: random.Random) -> None:
    for name, count, deadline in BATCHES:
        bodies = [request(chance, 420, 48) for _ in range(count)]
        lines = [
            json.dumps({"custom_id": str(n), "method": "POST", "url": CHAT, "body": body})
            for n, body in enumerate(bodies)
        ]
        upload = {"file": ("in.jsonl", "\n".join(lines))}
        file = await client.post("/v1/files", files=upload, data={"purpose": "batch"})
        made = {"input_file_id": file.json()["id"], "endpoint": CHAT}
        made |= {"completion_window": "24h", "deadline": deadline, "metadata": {"name": name}}
        (await client.post("/v1/batches", json=made)).raise_for_status()


async def chat(client: httpx.AsyncClient, chance: random.Random) -> None:
    """A burst each 5 to 10 seconds, until cancelled."""
    async with asyncio.TaskGroup() as group:
        while True:
            for _ in range(BURST):
                body = {**request(chance, 60, 40), "stream": True}
                group.create_task(client.post(CHAT, json=body))
            await asyncio.sleep(chance.uniform(5, 10))


async def draw(url: str, folder: Path) -> None:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        for name, scheme, width, height in PICTURES:
            size = ViewportSize(width=width, height=height)
            page = await browser.new_page(color_scheme=scheme, viewport=size)
            await page.goto(f"{url}/dashboard")
            await page.wait_for_selector("#batch-table tbody tr")
            await page.wait_for_timeout(2500)  # a few ticks, and the bars have moved
            await page.screenshot(path=folder / f"{name}.png", full_page=True)
        await browser.close()


async def draw_under_load(url: str, seconds: float, folder: Path) -> None:
    chance = random.Random(3)
    async with async_client_for(url, base_url=url, timeout=300) as client:
        await start_batches(client, chance)
        bursts = asyncio.create_task(chat(client, chance))
        await asyncio.sleep(seconds)
        await draw(url, folder)
        bursts.cancel()
        await asyncio.wait([bursts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url", nargs="?")
    parser.add_argument("--seconds", type=float, default=125.0)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "dashboard")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.url:
        asyncio.run(draw_under_load(args.url, args.seconds, args.out))
        return
    with serving() as url:
        asyncio.run(draw_under_load(url, args.seconds, args.out))


if __name__ == "__main__":
    main()
