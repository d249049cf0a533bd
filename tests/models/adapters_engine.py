"""A real engine with our scheduler and room for one LoRA adapter in a step.

    python -m tests.models.adapters_engine MODEL ADAPTER ADAPTER RESULT [careless]

Each request is asked alone. Then the same come together: offline requests of both adapters, those
of the first running, and online ones of the second in between, with rank 0 stopping steps at layers
drawn at random. All answers, and how many steps each online request waited for its first token, go
into the result file.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.models.stopping import NUM_STOPS, stop_at_random
from tests.stops.tiny_llama import random_text

OFFLINE = ("a0", "a1", "b0", "a2", "b1")
"""The first letter says which adapter; in the order of arrival."""
ONLINE = ("b7", "a8", "b9")
NUM_TOKENS = {"offline": 48, "online": 8}
EVERY = 12
"""Steps of offline work before the next online request."""


def make_engine(model: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from conserve.core.settings import PolicySettings
    from conserve.engine import plugin
    from conserve.engine.launch import vllm_arguments
    from conserve.engine.settings import EngineSettings

    plugin.register()
    policy = PolicySettings(stop_gap_share=1.0)
    settings = EngineSettings(profile_seconds=0, stop_response_s=1e-6, policy=policy)
    config = EngineArgs(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        kv_cache_memory_bytes=16 << 20,
        block_size=32,
        enable_lora=True,
        max_loras=1,
        max_cpu_loras=2,
        max_lora_rank=8,
        distributed_executor_backend="uni",
        **vllm_arguments(settings),
    ).create_engine_config()
    return LLMEngine.from_vllm_config(config, disable_log_stats=True)


class Asking:
    """Asks the engine, and keeps what it answers and what each step held."""

    def __init__(self, engine: Any, adapters: list[str]) -> None:
        self.engine = engine
        self.tokens: dict[str, list[int]] = {}
        self.waited: dict[str, int] = {}
        """Steps from when a request was asked to its first token."""
        self.steps: list[set[str]] = []
        """The adapters of each step."""
        self._adapters = dict(zip("ab", adapters, strict=True))
        self._scheduler = engine.engine_core.engine_core.scheduler
        self._driver_scheduled = self._scheduler.driver.scheduled
        self._scheduler.driver.scheduled = self._note
        self._asked: dict[str, int] = {}

    def ask(self, name: str, how: str) -> None:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        adapter = name[0]
        lora = LoRARequest(adapter, 1 + "ab".index(adapter), self._adapters[adapter])
        chance = random.Random(name)
        prompt = random_text(chance, chance.randrange(100, 300))
        num = NUM_TOKENS["online" if name in ONLINE else "offline"]
        params = SamplingParams(temperature=0.0, max_tokens=num, ignore_eos=True)
        priority = 1 if how == "together" and name in OFFLINE else 0
        key = f"{name}/{how}"
        self._asked[key] = len(self.steps)
        self.engine.add_request(key, prompt, params, lora_request=lora, priority=priority)

    def step(self) -> None:
        for output in self.engine.step():
            # The engine gives the request a name of its own, which begins with ours.
            key = output.request_id
            self.waited.setdefault(key, len(self.steps) - self._asked[key])
            if output.finished:
                self.tokens[key] = list(output.outputs[0].token_ids)

    def finish(self) -> None:
        while self.engine.has_unfinished_requests():
            self.step()

    def _note(self, record: Any, output: Any) -> None:
        if output.total_num_scheduled_tokens:
            self.steps.append({name[0] for name in output.num_scheduled_tokens})
        self._driver_scheduled(record, output)


def alone(asking: Asking) -> None:
    for name in (*OFFLINE, *ONLINE):
        asking.ask(name, "alone")
        asking.finish()


def together(asking: Asking) -> None:
    coming, asked_at, last = list(ONLINE), len(asking.steps), ""
    for name in OFFLINE:
        asking.ask(name, "together")
    while asking.engine.has_unfinished_requests():
        if last and f"{last}/together" not in asking.tokens:
            asked_at = len(asking.steps)  # chats of two adapters would wait for one another
        elif coming and len(asking.steps) - asked_at >= EVERY:
            last = coming.pop(0)
            asking.ask(last, "together")
        asking.step()


def look_at_no_adapter(driver: Any) -> None:
    """The negative control: vLLM alone keeps to the number of adapters."""
    from conserve.core.snapshot import Capacity

    decide = driver.planner
    driver.planner = lambda seen, *others: decide(replace(seen, capacity=Capacity()), *others)


def main(model: str, first: str, second: str, result: str, *careless: str) -> None:
    engine = make_engine(model)
    scheduler = engine.engine_core.engine_core.scheduler
    asking = Asking(engine, [first, second])
    num_free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    alone(asking)
    engine.reset_prefix_cache()
    asking.steps.clear()
    if careless:
        look_at_no_adapter(scheduler.driver)
    together(asking)
    told = {
        "tokens": asking.tokens,
        "waited": asking.waited,
        "steps": ["".join(sorted(adapters)) for adapters in asking.steps],
        "num_stops": len(NUM_STOPS),
        "leaked_blocks": num_free - scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
    }
    Path(result).write_text(json.dumps(told))
    engine.engine_core.shutdown()


if __name__ == "__main__":
    with stop_at_random(0.2):
        main(*sys.argv[1:])
