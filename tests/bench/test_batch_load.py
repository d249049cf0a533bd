"""The offline load as a batch: what is sent, what is counted, and what is left behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from conserve.bench.batch_load import BatchLoad, offline_figures
from conserve.bench.store import ResultFolder, Run, RunKey
from conserve.metrics import RequestRecord, throughput
from conserve.workload import RequestPlan

PLANS = [RequestPlan(f"offline-{n}", False, -5.0, 10, 4) for n in range(3)]


@dataclass
class BatchServer:
    """Files and batches, each status in turn; `body` fills in what was uploaded."""

    statuses: list[str]
    uploads: list[bytes] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.calls.append(f"{request.method} {request.url.path}")
        if request.url.path == "/v1/files":
            self.uploads.append(request.read())
            return httpx.Response(200, json={"id": "file-1"})
        if self.calls[-1] == "POST /v1/batches":
            asked = json.loads(request.read())
            assert (asked["input_file_id"], asked["endpoint"]) == ("file-1", "/v1/completions")
        status = self.statuses[0]
        if request.method == "GET" and len(self.statuses) > 1:
            status = self.statuses.pop(0)
        counts = {"total": 3, "completed": 1, "failed": 1}
        batch = {"id": "batch_1", "status": status, "request_counts": counts, "errors": "why"}
        return httpx.Response(200, json=batch)


def drive(server: Callable[[httpx.Request], httpx.Response], *steps: str) -> list[Any]:
    async def run() -> list[Any]:
        transport = httpx.MockTransport(server)
        async with httpx.AsyncClient(transport=transport, base_url="http://fake") as http:
            batch = BatchLoad(http)
            await batch.start(PLANS, lambda plan: {"prompt": [1] * plan.num_prompt_tokens})
            return [await getattr(batch, step)() for step in steps]

    return asyncio.run(run())


def test_a_batch_is_sent_counted_and_cancelled() -> None:
    server = BatchServer(["validating", "in_progress", "in_progress", "in_progress", "cancelled"])
    counted, _ = drive(server, "counters", "stop")
    assert counted == {
        "batch:done_lines_total": 2,
        "batch:failed_lines_total": 1,
        "batch:lines_left": 1,
    }
    assert "POST /v1/batches/batch_1/cancel" in server.calls
    sent = [json.loads(line) for line in server.uploads[0].splitlines() if line[:1] == b"{"]
    assert [line["custom_id"] for line in sent] == [plan.request_id for plan in PLANS]
    assert {line["url"] for line in sent} == {"/v1/completions"}
    assert sent[0]["body"] == {"prompt": [1] * 10}


def test_a_batch_that_has_ended_is_left_alone() -> None:
    server = BatchServer(["validating", "in_progress", "completed"])
    drive(server, "stop")
    assert not any("cancel" in call for call in server.calls)


def test_a_refused_batch_ends_the_run() -> None:
    with pytest.raises(RuntimeError, match="failed: why"):
        drive(BatchServer(["validating", "failed"]))
    with pytest.raises(RuntimeError, match="POST /v1/files: HTTP 503"):
        drive(lambda _: httpx.Response(503, json={}))


def test_what_the_server_counted_less_what_the_client_saw_is_offline() -> None:
    online = RequestRecord("on", True, 1.0, [2.0, 3.0], 100, 2)
    late = RequestRecord("late", True, 9.0, [11.0], 1000, 1)
    start = {"vllm:prompt_tokens_total": 50.0, "conserve:output_tokens_total{class=offline}": 7.0}
    end = {"vllm:prompt_tokens_total": 1150.0, "conserve:output_tokens_total{class=offline}": 57.0}
    start |= {"batch:done_lines_total": 2.0, "batch:failed_lines_total": 0.0}
    end |= {"batch:done_lines_total": 12.0, "batch:failed_lines_total": 1.0}
    run = Run(RunKey("all", "conserve-batch", 1), [online, late], start, end, 1.0)
    assert offline_figures(run, 10.0) == {
        "num_offline_finished": 9.0,
        "num_offline_failed": 1.0,
        "offline_rps": 0.9,
        "offline_prompt_tps": 100.0,
        "offline_output_tps": 5.0,
        "offline_tps": 105.0,
        "total_tps": 115.2,
    }


def test_the_servers_counts_agree_with_the_clients() -> None:
    """On stored runs whose offline requests had both: how a batch is counted, and how they were."""
    stored = ResultFolder(Path(__file__).parents[2] / "benchmarks" / "results" / "burst")
    duration_s = stored.description().parsed_scenario().duration_s
    runs = [run for run in stored.runs() if run.key.arm == "conserve"]
    assert runs
    for run in runs:
        seen = throughput([r for r in run.records if not r.online], 0, duration_s)
        counted = offline_figures(run, duration_s)
        assert counted["offline_prompt_tps"] == pytest.approx(seen.prompt_tps, rel=0.01)
        assert counted["offline_output_tps"] == pytest.approx(seen.output_tps, rel=0.01)
