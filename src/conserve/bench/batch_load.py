"""The offline requests of a run as one batch: uploaded, watched by its counts, and cancelled.

A batch's lines have no times that a client sees. What the arm's figures are made of is what the
server counts: lines from the batch itself, tokens from /metrics (`offline_figures`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx

from conserve.batch.lifecycle import TERMINAL
from conserve.bench.client import Body
from conserve.bench.store import Run
from conserve.metrics import throughput
from conserve.workload import RequestPlan

ENDPOINT = "/v1/completions"
LOOK_S = 0.1

LINES_DONE = "batch:done_lines_total"
LINES_FAILED = "batch:failed_lines_total"
LINES_LEFT = "batch:lines_left"
PROMPT_TOKENS = "vllm:prompt_tokens_total"
OUTPUT_TOKENS = "conserve:output_tokens_total{class=offline}"


class BatchLoad:
    """One batch on one server, for the length of one run."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._batch_id = ""

    async def start(self, plans: Sequence[RequestPlan], body: Body) -> None:
        """Upload, create, and wait until its lines may run. Raises RuntimeError."""
        form = {"file": ("offline.jsonl", _lines(plans, body), "application/jsonl")}
        file = await self._call("POST", "/v1/files", files=form, data={"purpose": "batch"})
        asked = {"input_file_id": file["id"], "endpoint": ENDPOINT, "completion_window": "24h"}
        self._batch_id = (await self._call("POST", "/v1/batches", json=asked))["id"]
        batch = await self._until(lambda status: status != "validating")
        if batch["status"] in TERMINAL:
            raise RuntimeError(f"the batch is {batch['status']}: {batch.get('errors')}")

    async def counters(self) -> dict[str, float]:
        """Its lines so far, named as counters."""
        counts = (await self._look())["request_counts"]
        done = counts["completed"] + counts["failed"]
        left = counts["total"] - done
        return {LINES_DONE: done, LINES_FAILED: counts["failed"], LINES_LEFT: left}

    async def stop(self) -> None:
        """Cancel what is left and wait until nothing of it runs."""
        if (await self._look())["status"] not in TERMINAL:
            await self._call("POST", f"/v1/batches/{self._batch_id}/cancel")
        await self._until(lambda status: status in TERMINAL)

    async def _look(self) -> Any:
        return await self._call("GET", f"/v1/batches/{self._batch_id}")

    async def _until(self, is_there: Callable[[str], bool]) -> Any:
        while True:
            batch = await self._look()
            if is_there(batch["status"]):
                return batch
            await asyncio.sleep(LOOK_S)

    async def _call(self, method: str, path: str, **request: Any) -> Any:
        response = await self._http.request(method, path, **request)
        if response.is_error:
            raise RuntimeError(f"{method} {path}: HTTP {response.status_code}: {response.text}")
        return response.json()


def _lines(plans: Sequence[RequestPlan], body: Body) -> bytes:
    fixed = {"method": "POST", "url": ENDPOINT}
    lines = ({"custom_id": plan.request_id, **fixed, "body": body(plan)} for plan in plans)
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def offline_figures(run: Run, duration_s: float) -> Mapping[str, float]:
    """What the batch got in the window [0, duration_s), under RunSummary's names.

    Counted at the same moments as a client counts: a prompt at its first output token (vLLM's
    counter, less the online prompts the client saw), an output token as it is made, a line when
    its result is stored.
    """
    online = throughput([r for r in run.records if r.online], 0, duration_s)
    lines, failed, prompt, output = (
        run.counted(name) or 0.0
        for name in (LINES_DONE, LINES_FAILED, PROMPT_TOKENS, OUTPUT_TOKENS)
    )
    # The two ends of a window are not read at one instant for both: never below nothing.
    prompt_tps = max(0.0, prompt / duration_s - online.prompt_tps)
    output_tps = output / duration_s
    return {
        "num_offline_finished": lines - failed,
        "num_offline_failed": failed,
        "offline_rps": (lines - failed) / duration_s,
        "offline_prompt_tps": prompt_tps,
        "offline_output_tps": output_tps,
        "offline_tps": prompt_tps + output_tps,
        "total_tps": online.prompt_tps + online.output_tps + prompt_tps + output_tps,
    }
