"""What safepoints cost a step that nobody stops: the same step watched and not, in pairs.

    python benchmarks/safepoint_overhead.py --output benchmarks/results/safepoint-overhead.json

One engine in this process. Every step prefills one new prompt of the same length, so all steps
are alike; within a pair, in an order drawn at random, one step is announced as stoppable (the
workers look at the flag) and the other is not. Reported are the medians of the pairs'
differences over the median unwatched step, with an interval from resampling the pairs, and,
because a step's own noise is far larger than the cost, the cost of one look by itself.
On a CUDA device a watched step also waits for events, which pairs show and the looks do not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conserve.core.latency import LatencyModel
from conserve.core.looks import LookCost
from conserve.core.plan import Mode, Plan
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import Snapshot
from conserve.engine.flag import StopFlag
from conserve.engine.safepoints import Safepoints
from conserve.engine.settings import EngineSettings

if TYPE_CHECKING:
    from conserve.engine.scheduler import ConserveScheduler
    from conserve.engine.steps import StepRecord

TARGET_SHARE = 0.005
RESAMPLES = 2000


class Bench:
    """An engine whose next step is one prefill of `num_tokens`, watched every k layers or not."""

    def __init__(self, options: argparse.Namespace) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        from conserve.engine import plugin
        from conserve.engine.launch import vllm_arguments

        plugin.register()
        self.num_tokens = options.tokens
        self.chance = random.Random(options.seed)
        self.every = 0
        engine_args = EngineArgs(
            model=str(options.model),
            enforce_eager=options.enforce_eager,
            max_model_len=options.tokens + 16,
            max_num_batched_tokens=options.tokens,
            max_num_seqs=1,
            kv_cache_memory_bytes=options.kv_cache_mib << 20,
            tensor_parallel_size=options.tensor_parallel_size,
            distributed_executor_backend="uni" if options.tensor_parallel_size == 1 else "mp",
            disable_log_stats=True,
            **vllm_arguments(EngineSettings(profile_seconds=0)),
        )
        self.engine: Any = LLMEngine.from_engine_args(engine_args)
        scheduler: ConserveScheduler = self.engine.engine_core.engine_core.scheduler
        stopper = scheduler.stopper
        if stopper.why_off:
            raise SystemExit(f"steps cannot be stopped on this engine: {stopper.why_off}")
        scheduler.driver.planner = self.plan
        self.scheduler = scheduler
        self.announces = stopper.announce
        stopper.announce = self.announce  # type: ignore[method-assign]
        self.vocabulary = self.scheduler.vllm_config.model_config.get_vocab_size()

    @property
    def num_layers(self) -> int:
        config = self.scheduler.vllm_config
        return int(config.model_config.get_num_layers(config.parallel_config))

    def plan(self, snapshot: Snapshot, model: LatencyModel, settings: PolicySettings) -> Plan:
        views = [*snapshot.running, *snapshot.waiting_offline]
        grants = {view.request_id: self.num_tokens for view in views}
        return Plan(Mode.OFFLINE if grants else Mode.IDLE, grants, stoppable=bool(grants))

    def announce(self, record: StepRecord, output: Any, look_cost: LookCost) -> bool:
        from conserve.engine.beside import our_metadata

        announced = self.announces(record, output, look_cost)
        ours = our_metadata(output.kv_connector_metadata)
        ours.every = self.every
        if not self.every:
            ours.stoppable_step = None
        return announced

    def step_s(self, every: int) -> float:
        """Seconds of one whole prefill with safepoints every so many layers; 0 for none."""
        from vllm import SamplingParams

        self.every = every
        prompt = self.chance.choices(range(10, self.vocabulary), k=self.num_tokens)
        self.engine.add_request(
            f"r{self.chance.random()}",
            {"prompt_token_ids": prompt},
            SamplingParams(max_tokens=1, ignore_eos=True),
            priority=1,
        )
        start = time.perf_counter()
        self.engine.step()
        elapsed_s = time.perf_counter() - start
        if self.engine.has_unfinished_requests():
            raise SystemExit("a prompt took more than one step; raise --kv-cache-mib")
        return elapsed_s


def compare(bench: Bench, every: int, num_pairs: int, chance: random.Random) -> dict[str, Any]:
    watched: list[float] = []
    unwatched: list[float] = []
    for _ in range(num_pairs):
        for arm in chance.sample((0, every), 2):
            (watched if arm else unwatched).append(bench.step_s(arm))
    middle = statistics.median(unwatched)
    shares = [(a - b) / middle for a, b in zip(watched, unwatched, strict=True)]
    medians = sorted(
        statistics.median(chance.choices(shares, k=num_pairs)) for _ in range(RESAMPLES)
    )
    return {
        "layers_between_safepoints": every,
        "num_pairs": num_pairs,
        "unwatched_median_s": round(middle, 6),
        "watched_median_s": round(statistics.median(watched), 6),
        "overhead_share": round(statistics.median(shares), 6),
        "overhead_share_95": [
            round(medians[int(RESAMPLES * 0.025)], 6),
            round(medians[int(RESAMPLES * 0.975)], 6),
        ],
    }


def look_s(num_layers: int, rounds: int = 20_000) -> dict[str, float]:
    """Seconds of one call of the layer hook: where it looks at the flag, and where it does not."""
    flag = StopFlag(f"overhead-{os.getpid()}")
    safepoints = Safepoints(flag, rank=0)
    found = {}
    for name, every in (("looks", 1), ("does_not_look", 0)):
        start = time.perf_counter()
        for step in range(1, rounds):
            if every:
                safepoints.begin(step, every)
            for _ in range(num_layers):
                safepoints.at_layer()
            safepoints.end()
        found[name] = (time.perf_counter() - start) / rounds / num_layers
    flag.unlink()
    return found


def hardware() -> dict[str, object]:
    import torch

    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    found: dict[str, object] = {"cpu": cpu, "num_cpus": os.cpu_count()}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found | {"python": sys.version.split()[0], "torch": torch.__version__}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder; the default model if left out")
    parser.add_argument("--tokens", type=int, default=512, help="of the prompt of each step")
    parser.add_argument("--pairs", type=int, default=150)
    parser.add_argument("--every", type=int, nargs="+", default=[1, 7], help="layers")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--enforce-eager", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--kv-cache-mib", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.model is None:
        from conserve.server.start.default_model import default_model

        options.model = default_model()
    bench, chance = Bench(options), random.Random(options.seed)
    for _ in range(10):
        bench.step_s(1)
        bench.step_s(0)
    rows = [compare(bench, every, options.pairs, chance) for every in options.every]
    looks = look_s(bench.num_layers)
    for row in rows:
        low, high = row["overhead_share_95"]
        print(
            f"a safepoint every {row['layers_between_safepoints']} layers: "
            f"{row['overhead_share']:+.3%} of {row['unwatched_median_s'] * 1000:.1f} ms "
            f"(95 %: {low:+.3%} to {high:+.3%}); aim: under {TARGET_SHARE:.1%}"
        )
    step_s = rows[0]["unwatched_median_s"]
    computed = bench.num_layers * looks["looks"] / step_s
    print(
        f"one look {looks['looks'] * 1e6:.2f} us, times {bench.num_layers} layers: {computed:.4%}; "
        f"without looking {looks['does_not_look'] * 1e9:.0f} ns"
    )
    if options.output:
        settings = {k: v for k, v in vars(options).items() if k not in ("output", "model")}
        record = {
            "command": "python " + " ".join(["benchmarks/safepoint_overhead.py", *sys.argv[1:]]),
            "hardware": hardware(),
            "settings": settings | {"model": options.model.name, "num_layers": bench.num_layers},
            "pairs": rows,
            "look_us": round(looks["looks"] * 1e6, 4),
            "no_look_us": round(looks["does_not_look"] * 1e6, 4),
            "looks_share": round(computed, 8),
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n")
    bench.engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
