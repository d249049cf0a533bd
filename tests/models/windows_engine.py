"""Real engines with our scheduler on models with windows, one after the other in one process.

    python -m tests.models.windows_engine '{family: folder of its model, ...}' RESULT [careless]

Each prompt is asked alone. Then all are asked again, as offline requests, in so few blocks that
bursts of online requests displace them, with rank 0 stopping at layers drawn at random. The answers
of each family go into the result file, and what became of its checkpoints.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from tests.models.pooling_engine import NUM_STOPS, stop_at_random
from tests.models.windows import FAMILIES, MAX_MODEL_LEN
from tests.stops.tiny_llama import random_text

NUM_PROMPTS = 12
NUM_TOKENS = 40
STEP_TOKENS = 256
BURST = 3
EVERY = 60
"""Steps between two bursts of online requests."""


def make_engine(family: str, model: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from conserve.core.settings import PolicySettings
    from conserve.engine import plugin
    from conserve.engine.launch import vllm_arguments
    from conserve.engine.settings import EngineSettings

    plugin.register()
    settings = EngineSettings(
        profile_seconds=0,
        stop_response_s=1e-6,
        checkpoint_bytes=64 << 20,
        checkpoint_verify=True,
        policy=PolicySettings(stop_gap_share=1.0),
    )
    config = EngineArgs(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=6,
        max_num_batched_tokens=STEP_TOKENS,
        num_gpu_blocks_override=FAMILIES[family].num_blocks,
        kv_cache_memory_bytes=64 << 20,
        block_size=32,
        distributed_executor_backend="uni",
        **vllm_arguments(settings),
    ).create_engine_config()
    return LLMEngine.from_vllm_config(config, disable_log_stats=True)


class Asking:
    """Asks the engine for answers, and counts what becomes of the KV of offline requests."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.scheduler = engine.engine_core.engine_core.scheduler
        self.answers: dict[str, list[int]] = {}
        self.counts: Counter[str] = Counter()
        checkpointer = self.scheduler.checkpointer
        self._count(checkpointer, "load", "restores")
        self._count(checkpointer, "leaves", "displacements")
        self._count(checkpointer, "_lose", "faults")

    def _count(self, owner: Any, method: str, what: str) -> None:
        call = getattr(owner, method)

        def counted(*args: Any) -> Any:
            self.counts[what] += 1
            return call(*args)

        setattr(owner, method, counted)

    def ask(self, name: str, prompt: str, *, online: bool) -> None:
        from vllm import SamplingParams

        how = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        self._engine.add_request(name, prompt, how, priority=0 if online else 1)

    def step(self) -> None:
        for output in self._engine.step():
            if output.finished:
                self.answers[output.request_id] = list(output.outputs[0].token_ids)

    def finish(self) -> None:
        while self._engine.has_unfinished_requests():
            self.step()

    def free_blocks(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def together(asking: Asking, prompts: list[str]) -> None:
    for i, prompt in enumerate(prompts):
        asking.ask(f"{i}/offline", prompt, online=False)
    num_offline, num_steps, coming = 0, 0, cycle(enumerate(prompts))
    while num_offline < len(prompts):
        if num_steps % EVERY == EVERY - 1:
            for i, prompt in islice(coming, BURST):
                asking.ask(f"{i}/online/{num_steps}", prompt, online=True)
        asking.step()
        num_steps += 1
        num_offline = sum(name.endswith("/offline") for name in asking.answers)
    asking.finish()


def played(family: str, model: str) -> dict[str, Any]:
    chance = random.Random(1)
    prompts = [random_text(chance, chance.randrange(150, 450)) for _ in range(NUM_PROMPTS)]
    engine = make_engine(family, model)
    asking = Asking(engine)
    free = [asking.free_blocks()]
    for i, prompt in enumerate(prompts):
        asking.ask(f"{i}/alone", prompt, online=True)
        asking.finish()
    engine.reset_prefix_cache()
    asking.scheduler.checkpointer.forget_all()
    asking.counts.clear()
    NUM_STOPS.clear()
    together(asking, prompts)
    free.append(asking.free_blocks())
    checkpointer = asking.scheduler.checkpointer
    result = {
        "answers": asking.answers,
        "counts": asking.counts,
        "stops": len(NUM_STOPS),
        "free_blocks": free,
        "num_groups": len(asking.scheduler.kv_cache_config.kv_cache_groups),
        "unusable": checkpointer.unusable,
        "kept_of_offline": checkpointer.pool.num_slots_of(online=False),
    }
    engine.engine_core.shutdown()
    return result


def restore_last_group_alone() -> None:
    """The negative control."""
    from conserve.engine.checkpoint.pool import HostPool

    places = HostPool.places

    def careless(self: HostPool, *args: Any) -> Any:
        return [place for place in places(self, *args) if place.group == len(self.groups) - 1]

    vars_of: Any = HostPool
    vars_of.places = careless


def main(models: dict[str, str], result: Path, *careless: str) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    stop_at_random(0.1)
    if careless:
        restore_last_group_alone()
    results = {}
    for family, model in models.items():
        results[family] = played(family, model)
        cleanup_dist_env_and_memory()
    result.write_text(json.dumps(results))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
