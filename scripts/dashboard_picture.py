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
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from playwright.sync_api import sync_playwright

from conserve.bench.server import Server, free_port

ROOT = Path(__file__).parents[1]
MODEL = "SmolLM2-135M-Instruct"
CHAT = "/v1/chat/completions"
BURST = 6
BATCHES = (("Nightly summaries", 260, "2h"), ("Label support tickets", 120, "6h"))
PICTURES = (
    ("dashboard", "light", 1440, 1000),
    ("dashboard-dark", "dark", 1440, 1000),
    ("dashboard-narrow", "light", 390, 844),
)
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


def request(chance: random.Random, words: list[str], number: int, max_tokens: int) -> dict:
    start = chance.randrange(len(words) - number)
    text = "Summarise: " + " ".join(words[start : start + number])
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "max_tokens": max_tokens}


async def load(url: str, seconds: float) -> None:
    """Two batches, and a burst of chat each 5 to 10 seconds."""
    chance = random.Random(3)
    words = (ROOT / "docs" / "batches.md").read_text().split()
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        for name, count, deadline in BATCHES:
            bodies = [request(chance, words, 420, 48) for _ in range(count)]
            lines = [
                json.dumps({"custom_id": str(n), "method": "POST", "url": CHAT, "body": body})
                for n, body in enumerate(bodies)
            ]
            upload = {"file": ("in.jsonl", "\n".join(lines))}
            file = await client.post("/v1/files", files=upload, data={"purpose": "batch"})
            made = {"input_file_id": file.json()["id"], "endpoint": CHAT}
            made |= {"completion_window": "24h", "deadline": deadline, "metadata": {"name": name}}
            (await client.post("/v1/batches", json=made)).raise_for_status()
        until, chats = time.monotonic() + seconds, []
        while time.monotonic() < until:
            for _ in range(BURST):
                body = {**request(chance, words, 60, 40), "stream": True}
                chats.append(asyncio.create_task(client.post(CHAT, json=body)))
            await asyncio.sleep(chance.uniform(5, 10))
        await asyncio.gather(*chats)


def draw(url: str, folder: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        for name, scheme, width, height in PICTURES:
            size = {"width": width, "height": height}
            page = browser.new_page(color_scheme=scheme, viewport=size)
            page.goto(f"{url}/dashboard")
            page.wait_for_selector("#batch-table tbody tr")
            page.wait_for_timeout(2500)  # a few ticks, and the bars have moved
            page.screenshot(path=folder / f"{name}.png", full_page=True)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url", nargs="?")
    parser.add_argument("--seconds", type=float, default=125.0)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "dashboard")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.url:
        asyncio.run(load(args.url, args.seconds))
        draw(args.url, args.out)
        return
    with serving() as url:
        asyncio.run(load(url, args.seconds))
        draw(url, args.out)


if __name__ == "__main__":
    main()
