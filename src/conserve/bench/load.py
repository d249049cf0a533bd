"""The client's own process: one job in, records and counters out.

It is a process of its own so that the runner's work never delays a token's time stamp.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from conserve.batch.connection import async_client_for
from conserve.bench.batch_load import BatchLoad
from conserve.bench.client import Body, Load, LoadClient
from conserve.bench.prompts import body_of
from conserve.metrics import write_records
from conserve.workload import RequestPlan, Scenario, Window, Workload, build_workload

WARM_UP_SEED = 2**31 - 1
WARM_UP_REQUESTS = 6


@dataclass(frozen=True, slots=True)
class Job:
    """One run of one arm.

    scenario: its values, at one point of its sweep. text: names the run's own prompts; runs on one
    server must differ in it, or the second would find the first one's in the prefix cache.
    probe_gflops: the machine's speed just before, kept with the counters.
    """

    base_url: str
    model: str
    scenario: dict[str, Any]
    seed: int
    text: str
    traces: dict[str, str]
    online: bool
    offline: bool
    offline_fields: dict[str, Any]
    batch: bool
    warm_up: bool
    probe_gflops: float
    records: str
    counters: str


def start(job: Job, log: Path) -> subprocess.Popen[bytes]:
    """Run a job in a process of its own; the last line of its log says what went wrong."""
    command = [sys.executable, "-m", "conserve.bench.load", json.dumps(asdict(job))]
    with log.open("wb") as out:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            # Ctrl-C reaches the runner alone, which then ends the client.
            start_new_session=True,
        )


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    load = Load()
    try:
        asyncio.run(_drive(job, load))
    except (RuntimeError, httpx.HTTPError) as error:
        sys.exit(str(error))
    except asyncio.CancelledError:
        sys.exit("ended before the run was over")
    finally:
        write_records(Path(job.records), load.records)
        counters = {
            "probe_gflops": round(job.probe_gflops, 1),
            "start": load.counters_start,
            "end": load.counters_end,
        }
        Path(job.counters).write_text(json.dumps(counters, indent=1, sort_keys=True) + "\n")


async def _drive(job: Job, load: Load) -> None:
    task = asyncio.current_task()
    assert task
    # The runner ends a run this way; what was seen is still written.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    scenario = Scenario.of(job.scenario, "scenario")
    traces = {name: Path(path) for name, path in job.traces.items()}
    workload = _of_classes(build_workload(scenario, job.seed, traces), job)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with async_client_for(
        job.base_url, base_url=job.base_url, timeout=None, limits=limits
    ) as http:
        if job.warm_up:
            other = _of_classes(build_workload(scenario, WARM_UP_SEED, traces), job)
            await LoadClient(http, _body(job, "warm-up")).ask(_warm_up_plans(other))
        window = Window(workload.lead_in_s, scenario.duration_s, scenario.drain_s)
        body = _body(job, job.text)
        if not (job.batch and workload.offline):
            await LoadClient(http, body).run(workload, window, load)
            return
        batch = BatchLoad(http)
        await batch.start(workload.offline, body)
        online = replace(workload, offline=[], in_flight=0)
        await LoadClient(http, body, batch.counters).run(online, window, load)
        await batch.stop()


def _of_classes(workload: Workload, job: Job) -> Workload:
    """The workload with only the classes the arm is sent."""
    return replace(
        workload,
        online=workload.online if job.online else [],
        offline=workload.offline if job.offline else [],
        in_flight=workload.in_flight if job.offline else 0,
    )


def _warm_up_plans(workload: Workload) -> list[RequestPlan]:
    return workload.online[:WARM_UP_REQUESTS] + workload.offline[:WARM_UP_REQUESTS]


def _body(job: Job, text: str) -> Body:
    return body_of(job.model, job.model, text, job.offline_fields)


if __name__ == "__main__":
    main()
