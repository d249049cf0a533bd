"""A server as it comes, started, asked and ended: whether everything works at all.

python benchmarks/gpu/answers.py --model FOLDER --out FILE
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from measured import KINDS, answered, is_answered
from sizes import server_arguments
from written import write_json

from conserve.bench.machine import server_environment
from conserve.bench.ports import free_port
from conserve.bench.server import Server, ServerDiedError

LONG_S = 60.0
TOLD = re.compile(
    r"model runner|attention backend|FLASH_ATTN|Triton|cuda ?graph|torch\.compile|KV cache size|"
    r"Maximum concurrency|targets|profile|pinned|stop|WARNING|ERROR",
    re.IGNORECASE,
)
"""Lines of the server's log that say what it chose."""


def ask(http: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    started_s = time.perf_counter()
    response = http.post(path, json=body)
    seconds = time.perf_counter() - started_s
    return {"status": response.status_code, "seconds": seconds, "text": response.text[:600]}


def stream(http: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    """Times of each message after the first, in seconds from the question."""
    started_s, times = time.perf_counter(), []
    with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            times += [time.perf_counter() - started_s] * line.startswith("data: {")
    return {"status": response.status_code, "times_s": times}


def answers(http: httpx.Client, model: str) -> Iterator[tuple[str, Any]]:
    """Each question and its answer, as soon as it is there. One that fails costs no other."""
    prompt = [100 + i % 1000 for i in range(200)]
    body = {"model": model, "prompt": prompt, "max_tokens": 16, "ignore_eos": True}
    chat = {"model": model, "max_tokens": 8, "messages": [{"role": "user", "content": "aaab"}]}
    questions: dict[str, Callable[[], Any]] = {
        "first": lambda: ask(http, "/v1/completions", body),
        "streamed": lambda: stream(http, body | {"prompt": prompt[::-1]}),
        "offline": lambda: ask(http, "/v1/completions", body | {"service_tier": "flex"}),
        "chat": lambda: ask(http, "/v1/chat/completions", chat),
        "metrics": lambda: _ours(http.get("/metrics").text),
        "dashboard": lambda: {"status": http.get("/dashboard").status_code},
    }
    for name, question in questions.items():
        try:
            yield name, question()
        except httpx.HTTPError as error:
            yield name, {"error": f"{type(error).__name__}: {error}"}


def _ours(text: str) -> dict[str, float]:
    """Our counters and gauges, one value each."""
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("conserve:")]
    return {name: float(value) for name, value in lines if "_bucket" not in name}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    # Whoever is ended for being late must end its server too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("over time"))
    port, log = free_port(), options.out.with_suffix(".log")
    command = [sys.executable, "-c", "from conserve.cli.main import main; main()", "serve"]
    command += [options.model, f"--port={port}", "--host=127.0.0.1"]
    command += [f"--data-dir={options.out.parent / 'cache' / 'batches'}"]
    command += server_arguments(tiny=options.tiny)
    found: dict[str, Any] = {"flags": server_arguments(tiny=options.tiny)}
    with Server(command, server_environment(options.model), port, log) as server:
        try:
            found["ready_s"] = server.wait_until_healthy()
            write_json(options.out, found)
            with httpx.Client(base_url=server.base_url, timeout=LONG_S, trust_env=False) as http:
                for name, answer in answers(http, options.model):
                    found[name] = answer
                    write_json(options.out, found)
        except (ServerDiedError, SystemExit) as error:
            found["error"] = f"{type(error).__name__}: {error}"
    lines = log.read_text(errors="replace").splitlines()
    found["told"] = [line[:300] for line in lines if TOLD.search(line)][:120]
    write_json(options.out, found)
    wrong = [kind for kind in KINDS if kind not in answered(found)]
    print(
        json.dumps({"ready_s": found.get("ready_s"), "wrong": wrong, "error": found.get("error")})
    )
    return 0 if is_answered(found) else 1


if __name__ == "__main__":
    sys.exit(main())
