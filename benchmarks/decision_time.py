"""How long the policy takes to decide a step, with a full engine and a deep offline backlog.

    python benchmarks/decision_time.py --output results/decision_time.json

256 requests run and 100,000 offline requests wait, of which a snapshot holds the head.
Reported: the median over repeats of the mean time of one call, in microseconds, of
building the snapshot and of deciding. The snapshot is built by the engine's own tracker and
queue (which need vLLM) from requests with the fields of vLLM's. The backlog lies in the
queue, so a cost that grew with it would show: compare with --backlog 100.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from conserve.core.latency import LatencyModel
from conserve.core.plan import Plan
from conserve.core.policy import decide
from conserve.core.snapshot import Snapshot
from conserve.engine.promises import Promises
from conserve.engine.queue import ClassQueue
from conserve.engine.settings import EngineSettings
from conserve.engine.tracker import RequestTracker

BLOCK_SIZE = 16
TARGET_US = 300.0
MOST_TOKENS = 8192
MODEL = LatencyModel(fixed=0.006, per_token=2.5e-5, per_pair=5e-10, per_context=1e-9, knee=256)


def not_cached(request: EngineRequest) -> tuple[int, int]:
    """What the prefix cache has of a prompt nobody sent before."""
    return request.num_computed_tokens, 0


@dataclass(eq=False)
class EngineRequest:
    """The fields of vLLM's request that the tracker and the queue read."""

    request_id: str
    priority: int
    arrival_time: float
    num_tokens: int
    num_computed_tokens: int = 0
    num_output_placeholders: int = 0
    max_tokens: int = 1024
    skip_reading_prefix_cache: bool = False
    resumable: bool = False
    next_decode_eligible_step: int = 0
    sampling_params: None = None
    lora_request: None = None

    @property
    def num_tokens_with_spec(self) -> int:
        return self.num_tokens

    @property
    def num_prompt_tokens(self) -> int:
        return self.num_tokens


def running_request(index: int, online: bool, prefill: bool) -> EngineRequest:
    num_tokens = 400 + 37 * index % 3000
    return EngineRequest(
        request_id=f"{'online' if online else 'offline'}-{index:06d}",
        priority=0 if online else 1,
        arrival_time=0.01 * index,
        num_tokens=num_tokens,
        num_computed_tokens=num_tokens // 2 if prefill else num_tokens - 1,
    )


@dataclass
class Scene:
    """An engine's state: who runs and who waits."""

    running: list[EngineRequest]
    queue: ClassQueue
    num_free_blocks: int
    num_free_slots: int
    can_stop: bool
    head: int
    tracker: RequestTracker

    def snapshot(self) -> Snapshot:
        return Snapshot(
            now_s=10.0,
            running=self.tracker.running(self.running),
            waiting_online=self.tracker.waiting(self.queue.online, not_cached, MOST_TOKENS),
            waiting_offline=self.tracker.waiting(
                self.queue.offline_head(self.head), not_cached, MOST_TOKENS
            ),
            num_free_blocks=self.num_free_blocks,
            num_free_slots=self.num_free_slots,
            block_size=BLOCK_SIZE,
            max_step_tokens=MOST_TOKENS,
            interruption_rate=0.5,
            online_residency=0.6,
            can_stop=self.can_stop,
        )


def running_requests(number: int, share_online: float, prefills: bool) -> list[EngineRequest]:
    """One in sixteen of the offline ones prefills, and of the online ones if `prefills`."""
    requests = []
    for i in range(number):
        online = i < share_online * number
        requests.append(running_request(i, online, i % 16 == 15 and (prefills or not online)))
    return requests


def track(requests: Iterable[EngineRequest]) -> RequestTracker:
    """A tracker that knows the requests, each decode's newest token 20 ms old or less."""
    tracker = RequestTracker(BLOCK_SIZE, Promises(EngineSettings()))
    for index, request in enumerate(requests):
        tracker.add(request, request.arrival_time)
        view = tracker.get(request.request_id)
        if view and request.num_computed_tokens == request.num_tokens - 1:
            view.last_token_s = 9.98 + 1e-4 * (index % 100)
    return tracker


def scenes(num_running: int, backlog: int, head: int) -> dict[str, Scene]:
    """Scenes of each mode; `displacing` has online arrivals, no free block and no free slot."""
    waiting = [
        EngineRequest(f"waiting-{i:06d}", 1, 1.0 + 1e-6 * i, 200 + i % 1800) for i in range(backlog)
    ]
    arriving = [EngineRequest(f"arrival-{i}", 0, 9.99, 600 + i) for i in range(8)]

    def scene(
        share_online: float, arrivals: bool, free: bool = True, can_stop: bool = False
    ) -> Scene:
        running = running_requests(num_running, share_online, prefills=arrivals)
        queue = ClassQueue()
        for request in chain(waiting, arriving if arrivals else ()):
            queue.add_request(request)
        tracker = track(chain(running, queue))
        blocks, slots = (4000, 64) if free else (0, 0)
        return Scene(running, queue, blocks, slots, can_stop, head, tracker)

    return {
        "online only": scene(1.0, arrivals=True),
        "mixed, decodes": scene(0.5, arrivals=False),
        "mixed, arrivals": scene(0.5, arrivals=True),
        "displacing": scene(0.5, arrivals=True, free=False),
        "offline, stoppable": scene(0.0, arrivals=False, can_stop=True),
        "offline, not stoppable": scene(0.0, arrivals=False),
    }


def median_us(call: Callable[[], object], calls: int, repeats: int) -> float:
    """Median over `repeats` of the mean time of one of `calls` calls, in microseconds."""
    means = []
    call()
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        means.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(means)


def measure(scene: Scene, calls: int, repeats: int) -> dict[str, object]:
    snapshot = scene.snapshot()
    plan: Plan = decide(snapshot, MODEL)
    decide_us = median_us(lambda: decide(snapshot, MODEL), calls, repeats)
    snapshot_us = median_us(scene.snapshot, calls, repeats)
    return {
        "mode": str(plan.mode),
        "num_running": len(scene.running),
        "num_grants": len(plan.grants),
        "num_displaced": len(plan.displace),
        "snapshot_us": round(snapshot_us, 1),
        "decide_us": round(decide_us, 1),
        "total_us": round(snapshot_us + decide_us, 1),
    }


def hardware() -> dict[str, object]:
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    return {"cpu": cpu, "num_cpus": os.cpu_count(), "python": sys.version.split()[0]}


def print_table(results: dict[str, dict[str, object]]) -> None:
    columns = ("mode", "num_grants", "num_displaced", "snapshot_us", "decide_us", "total_us")
    print(f"{'scene':24}" + "".join(f"{column:>15}" for column in columns))
    for name, row in results.items():
        print(f"{name:24}" + "".join(f"{row[column]!s:>15}" for column in columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--backlog", type=int, default=100_000)
    parser.add_argument("--head", type=int, default=32, help="offline requests in a snapshot")
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    measured = scenes(options.running, options.backlog, options.head)
    # 100,000 live objects are not this benchmark's to walk through again and again.
    gc.collect()
    gc.freeze()
    results = {
        name: measure(scene, options.calls, options.repeats) for name, scene in measured.items()
    }
    print_table(results)
    slowest_us = max(float(str(row["decide_us"])) for row in results.values())
    print(f"slowest decision: {slowest_us:.0f} us; target {TARGET_US:.0f} us")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in vars(options).items() if k != "output"}
        record = {"hardware": hardware(), "settings": settings, "scenes": results}
        options.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
