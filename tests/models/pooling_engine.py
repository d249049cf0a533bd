"""Real engines with our scheduler on pooling models, one after the other in one process.

    python -m tests.models.pooling_engine '{family: folder of its model, ...}' RESULT [careless]

Each prompt is asked alone. Then all are asked again, as offline requests, with rank 0 stopping at
layers drawn at random, slots for few of them, and the same prompts as online requests in between.
Both sets of vectors of each family go into the result file.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from conserve.engine.flag import StopFlag
from conserve.engine.steps import GENERIC_MODEL
from tests.models.pooling import FAMILIES, MAX_MODEL_LEN
from tests.stops.tiny_llama import random_text

NUM_PROMPTS = 12
STEP_TOKENS = 512
EVERY = 5
"""Steps between two online requests."""
NUM_STOPS: dict[int, int] = {}
"""Step -> the layer at which it stopped."""


def stop_at_random(share: float) -> None:
    chance, lead = random.Random(0), StopFlag.lead

    def lead_and_stop(self: StopFlag, step: int, point: int) -> bool:
        if chance.random() < share:
            self.raise_for(step)
        if stops := lead(self, step, point):
            NUM_STOPS[step] = point
        return stops

    StopFlag.lead = lead_and_stop  # type: ignore[method-assign]


def make_engine(family: str, model: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from conserve.core.settings import PolicySettings
    from conserve.engine import plugin
    from conserve.engine.launch import vllm_arguments
    from conserve.engine.settings import EngineSettings

    plugin.register()
    policy = PolicySettings(stop_gap_share=1.0)
    settings = EngineSettings(profile_seconds=0.5, stop_response_s=1e-6, policy=policy)
    config = EngineArgs(
        model=model,
        runner="pooling",
        dtype="float32",
        enforce_eager=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=4,
        max_num_batched_tokens=STEP_TOKENS,
        kv_cache_memory_bytes=16 << 20,
        block_size=32,
        distributed_executor_backend="uni",
        **vllm_arguments(settings),
        **FAMILIES[family].options,
    ).create_engine_config()
    return LLMEngine.from_vllm_config(config, disable_log_stats=True)


class Asking:
    """Asks the engine for vectors, and keeps what each step held."""

    def __init__(self, engine: Any, task: str) -> None:
        from vllm import PoolingParams

        self._engine, self._params = engine, PoolingParams(task=task)
        self.vectors: dict[str, list[float]] = {}
        self.cut: set[str] = set()
        """Requests of which a step held a part."""
        scheduler = engine.engine_core.engine_core.scheduler
        self._scheduled = scheduler.driver.scheduled
        scheduler.driver.scheduled = self._note
        self._requests = scheduler.requests

    def _note(self, record: Any, output: Any) -> None:
        for name, num_tokens in output.num_scheduled_tokens.items():
            if num_tokens < self._requests[name].num_prompt_tokens:
                self.cut.add(name)
        self._scheduled(record, output)

    def ask(self, name: str, prompt: str, *, online: bool) -> None:
        self._engine.add_request(name, prompt, self._params.clone(), priority=0 if online else 1)

    def step(self) -> None:
        for output in self._engine.step():
            if output.finished:
                self.vectors[output.request_id] = output.outputs.data.flatten().tolist()

    def finish(self) -> None:
        while self._engine.has_unfinished_requests():
            self.step()


def alone(asking: Asking, prompts: list[str]) -> None:
    for i, prompt in enumerate(prompts):
        asking.ask(f"{i}/alone", prompt, online=True)
        asking.finish()


def together(asking: Asking, engine: Any, prompts: list[str]) -> None:
    for i, prompt in enumerate(prompts):
        asking.ask(f"{i}/offline", prompt, online=False)
    coming = list(enumerate(prompts))
    num_steps = 0
    while engine.has_unfinished_requests() or coming:
        if coming and num_steps % EVERY == 0:
            i, prompt = coming.pop(0)
            asking.ask(f"{i}/online", prompt, online=True)
        asking.step()
        num_steps += 1


def played(family: str, model: str) -> dict[str, Any]:
    chance = random.Random(1)
    prompts = [random_text(chance, chance.randrange(20, 500)) for _ in range(NUM_PROMPTS)]
    engine = make_engine(family, model)
    experience = engine.engine_core.engine_core.scheduler.experience
    profiled = experience.model != GENERIC_MODEL
    asking = Asking(engine, FAMILIES[family].task)
    alone(asking, prompts)
    engine.reset_prefix_cache()
    NUM_STOPS.clear()
    together(asking, engine, prompts)
    scheduler = engine.engine_core.engine_core.scheduler
    result = {
        "vectors": asking.vectors,
        "cut": sorted(asking.cut),
        "stops": sorted(NUM_STOPS.values()),
        "profiled": profiled,
        "chunked": scheduler.vllm_config.scheduler_config.enable_chunked_prefill,
    }
    engine.engine_core.shutdown()
    return result


def pool_what_was_stopped() -> None:
    """The negative control."""
    from conserve.engine.unwind import UnwindV1

    UnwindV1._pooling = lambda self, pool: pool  # type: ignore[method-assign]


def main(models: dict[str, str], result: Path, *careless: str) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    stop_at_random(0.15)
    if careless:
        pool_what_was_stopped()
    results = {}
    for family, model in models.items():
        results[family] = played(family, model)
        cleanup_dist_env_and_memory()
    result.write_text(json.dumps(results))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
