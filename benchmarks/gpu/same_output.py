"""Greedy text of a whole engine whose forwards are stopped at random, and of one left alone.

    python benchmarks/gpu/same_output.py --runner v2 --scheduling async --graphs --out FILE

A small random Llama in one process. Every request is answered alone, then all together without a
stop, then all together with stops at random layers of random steps. Together there are fewer slots
than requests, and the online ones among them come while offline ones hold them all. In float32 the
three are equal, but where a device sums in an order that depends on who shares a step: then no more
texts may differ with stops than without. The exit status is 1 if more do, or no step was stopped;
`wrong` in the file says so. On a CPU Model Runner V2 needs the `triton` package on the path: its
kernels run in Triton's interpreter, which takes CPU tensors. With `--compiled` a CPU's engine is
compiled as a GPU's is, without CUDA graphs. `--careless` breaks the end of a stopped step on
purpose.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections import Counter, deque
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import compiled
import interpreter
from models import write_random_llama
from written import write_json

from conserve.core.stop_gap import StopGap

if TYPE_CHECKING:
    from conserve.engine.scheduler import ConserveScheduler
    from conserve.engine.stats import EngineStats
    from conserve.engine.stoppable import StoppableSteps

NUM_REQUESTS, NUM_OUTPUT = 10, 12
STEPS_BETWEEN = 8
"""From one online request to the next."""
STOP_CHANCE = 0.25
"""At each safepoint of a stoppable step."""

Texts = list[list[int]]


def set_environment(runner: str, *, on_cpu: bool) -> None:
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "v2" else "0",
    }
    if not on_cpu:
        # Triton's attention, the only one for float32, multiplies in TF32 otherwise: ten bits.
        os.environ["TRITON_F32_DEFAULT"] = "ieee"
    if runner == "v2" and on_cpu:
        interpreter.interpret_triton()


def build(options: argparse.Namespace, folder: Path) -> Any:
    from vllm import LLM

    from conserve.engine.launch import vllm_arguments
    from conserve.engine.settings import EngineSettings

    settings = EngineSettings(profile_seconds=0, stop="eager", stop_response_s=1e-6)
    graphs: dict[str, Any] = {"enforce_eager": True}
    if options.compiled:
        graphs = {"compilation_config": {"cudagraph_capture_sizes": []}}
    if options.graphs:
        graphs = {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 16, 64]}}
    return LLM(
        str(folder),
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_batched_tokens=128,
        max_num_seqs=3,
        dtype=options.dtype,
        kv_cache_memory_bytes=1 << 25,
        # Several of these may share a GPU.
        gpu_memory_utilization=0.1,
        async_scheduling=options.scheduling == "async",
        **graphs,
        **vllm_arguments(settings),
    )


def texts_of(rng: Random) -> Texts:
    """Some begin alike, so that blocks are shared through the prefix cache."""
    common = [rng.randrange(3, 500) for _ in range(96)]
    own = [
        [rng.randrange(3, 500) for _ in range(rng.randrange(20, 220))] for _ in range(NUM_REQUESTS)
    ]
    return [common + text if i % 3 == 0 else text for i, text in enumerate(own)]


def generate(engine: Any, texts: Texts) -> Texts:
    """Greedy token ids. Every third request is online, and comes when the others have run for some
    steps: one of them is displaced."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=NUM_OUTPUT, temperature=0.0, ignore_eos=True, detokenize=False
    )

    def add(number: int, priority: int) -> None:
        prompt = {"prompt_token_ids": texts[number]}
        engine.add_request(str(number), prompt, params, priority=priority)

    online = deque(number for number in range(len(texts)) if number % 3 == 1)
    for number in set(range(len(texts))) - set(online):
        add(number, 1)
    answers: dict[str, list[int]] = {}
    while online or engine.has_unfinished_requests():
        for _ in range(STEPS_BETWEEN):
            done = [answer for answer in engine.step() if answer.finished]
            answers |= {answer.request_id: list(answer.outputs[0].token_ids) for answer in done}
        if online:
            add(online.popleft(), 0)
    return [answers[str(number)] for number in range(len(texts))]


def counted(stats: EngineStats) -> Counter[str]:
    """What the engine counts from here on, by the names of its figures."""
    counts: Counter[str] = Counter()
    count = stats.count

    def noted(name: str, amount: float = 1.0, label: str = "") -> None:
        counts[name] += int(amount)
        count(name, amount, label)

    stats.count = noted  # type: ignore[method-assign]
    return counts


class NoGap(StopGap):
    """Steps this small are no longer than what is between them; they are to be stopped all the
    same."""

    @property
    def seconds(self) -> float:
        return 0.0


def break_the_end(worker: Any) -> None:
    """The negative control: a stopped step that leaves a trace in the runner."""
    steps: StoppableSteps = worker._steps
    unwinding, runner = steps.unwinding, worker.model_runner
    assert unwinding is not None, "this engine stops no step"
    finish = unwinding.finish

    def careless() -> Any:
        if hasattr(runner, "req_states"):
            runner.req_states.num_computed_tokens.gpu += 1
        else:
            for state in runner.requests.values():
                state.prompt_token_ids[-1] = 3
            runner.input_batch.token_ids_cpu[:, :] = 3
        return finish()

    unwinding.finish = careless  # type: ignore[method-assign]


def wrong(found: dict[str, Any]) -> str:
    """Why this shows no equality; empty where it does."""
    if not found["can_stop"]:
        return f"this engine stops no step: {found['why_off']}"
    if not found["num_stops"]:
        return "no step was stopped: nothing is compared"
    flips = found["requests"] - found["equal_with_stops"]
    noise = found["requests"] - found["equal_without_stops"]
    # Three times the deviation of such a count.
    if flips > noise + 3 * math.sqrt(noise):
        return f"{flips} texts differ from those alone with stops, {noise} without"
    return ""


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch

    on_cpu = not torch.cuda.is_available()
    set_environment(options.runner, on_cpu=on_cpu)
    # Several of these may run beside one another.
    os.environ["VLLM_CACHE_ROOT"] = str(folder / "cache")
    write_random_llama(folder, dtype=options.dtype)
    if on_cpu and options.scheduling == "async":
        interpreter.keep_async_on()
    if options.compiled:
        compiled.compile_in_pieces(options.runner)
    llm = build(options, folder)
    from conserve.engine.connector import find_ours
    from conserve.engine.door import get_kv_transfer_group

    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    scheduler: ConserveScheduler = core.scheduler
    config, counts = engine.vllm_config, counted(scheduler.stats)
    scheduler.experience.stop_gap = NoGap()
    if options.careless:
        break_the_end(core.model_executor.driver_worker.worker)
    ours = find_ours(get_kv_transfer_group())
    assert ours is not None
    safepoints = ours.worker_side.safepoints
    rng = Random(options.seed)
    layers: list[int] = []

    def never(step: int, point: int) -> bool:
        return False

    def at_random(step: int, point: int) -> bool:
        stop = rng.random() < STOP_CHANCE
        if stop:
            layers.append(point)
        return stop

    same = {"alone": 0, "together": 0, "of": 0}
    for _ in range(options.rounds):
        texts = texts_of(rng)
        found = []
        safepoints._decide = never
        found.append([generate(engine, [text])[0] for text in texts])
        for decide in (never, at_random):
            safepoints._decide = decide
            scheduler.reset_prefix_cache()
            found.append(generate(engine, texts))
        for alone, together, stopped in zip(*found, strict=True):
            same["alone"] += alone == stopped
            same["together"] += alone == together
            same["of"] += 1
    return {
        "runner": "v2" if config.use_v2_model_runner else "v1",
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "compiled_pieces": compiled.num_pieces(),
        "dtype": options.dtype,
        "seed": options.seed,
        "can_stop": not scheduler.stopper.why_off,
        "why_off": scheduler.stopper.why_off,
        "num_stops": len(layers),
        "stopped_at_layers": sorted(set(layers)),
        "displaced_requests": counts["displaced_requests"],
        "restored_tokens": counts["restored_tokens"],
        "requests": same["of"],
        "equal_with_stops": same["alone"],
        "equal_without_stops": same["together"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runner", choices=("v1", "v2"), required=True)
    parser.add_argument("--scheduling", choices=("sync", "async"), default="sync")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--careless", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(options, Path(folder))
    found["wrong"] = wrong(found)
    write_json(options.out, found)
    print(found["wrong"] or "texts with stops are those without")
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
