"""A real vLLM engine with our scheduler, on the tiny model, in a process of its own.

    python real_engine.py '{"model": ..., "lora": ..., "log": ..., "result": ...}'

It answers the same requests twice: as online ones, in whose steps nobody may stop, then as
offline ones, with rank 0 stopping at layers drawn at random and online ones coming in between.
Both sets of answers go into the result file; every rank logs each stop it made.

The patches below stand at module level, because worker processes import this file too.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conserve.engine.flag import StopFlag
from tests.stops.tiny_llama import random_text

JOB = json.loads(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("REAL_ENGINE_JOB", "{}"))
PLAIN_KINDS = ("greedy", "seeded", "penalised", "logprobs", "prompt_logprobs", "schema", "regex")
LORA_KINDS = tuple(kind for kind in PLAIN_KINDS if kind != "prompt_logprobs")
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


def patch_flag(job: dict[str, Any]) -> None:
    chance, share = random.Random(job.get("seed", 0)), float(job.get("share", 0.2))
    lead, follow = StopFlag.lead, StopFlag.follow

    def note(rank: str, step: int, point: int) -> None:
        with Path(job["log"]).open("a") as log:
            log.write(f"{rank} {step} {point}\n")

    def lead_and_stop(self: StopFlag, step: int, point: int) -> bool:
        if chance.random() < share:
            self.raise_for(step)
        if stops := lead(self, step, point):
            note("leader", step, point)
        return stops

    def follow_and_note(self: StopFlag, step: int, point: int) -> bool:
        if stops := follow(self, step, point):
            note(f"follower-{os.getpid()}", step, point)
        return bool(stops and job.get("careless") != "follower")

    def silent_lead(self: StopFlag, step: int, point: int) -> bool:
        return chance.random() < share

    StopFlag.lead = silent_lead if job.get("careless") == "leader" else lead_and_stop  # type: ignore[method-assign]
    StopFlag.follow = follow_and_note  # type: ignore[method-assign]


if JOB:
    os.environ["REAL_ENGINE_JOB"] = json.dumps(JOB)
    patch_flag(JOB)


def requests(job: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, prompt, how to sample): every kind of request, several of each.

    vLLM 0.32 itself fails on a CPU on prompt logprobs where LoRA is enabled; and there it
    applies the last adapter to requests without one too, so with LoRA all have it.
    """
    chance = random.Random(job.get("seed", 0))
    head = random_text(chance, 100)
    chosen = LORA_KINDS if job.get("lora") else PLAIN_KINDS
    for i in range(job.get("rounds", 3)):
        kinds: dict[str, dict[str, Any]] = {
            "greedy": {},
            "seeded": {"temperature": 1.0, "seed": 100 + i},
            "penalised": {"repetition_penalty": 1.3, "presence_penalty": 0.5},
            "logprobs": {"logprobs": 3},
            "prompt_logprobs": {"prompt_logprobs": 2},
            "schema": {"structured": {"json": SCHEMA}, "ignore_eos": False},
            "regex": {"structured": {"regex": "(ab|cd){4,9}[0-9]{6}"}, "ignore_eos": False},
        }
        for kind, how in kinds.items():
            if kind not in chosen:
                continue
            prompt = random_text(chance, chance.randrange(20, 400))
            yield f"{kind}-{i}", head + prompt if chance.random() < 0.5 else prompt, how


def make_engine(job: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from conserve.engine import plugin
    from conserve.engine.launch import vllm_arguments
    from conserve.engine.settings import EngineSettings

    plugin.register()
    if job.get("careless") == "scheduler":
        from conserve.engine import stopper

        vars(stopper)["roll_back"] = lambda *_: []
    settings = EngineSettings(profile_seconds=0, stop_response_s=1e-6, **job.get("settings", {}))
    ours = vllm_arguments(settings)
    options: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "kv_cache_memory_bytes": 16 << 20,
        "block_size": 32,
        "enable_lora": bool(job.get("lora")),
        "max_lora_rank": 8,
        "disable_log_stats": True,
        **job.get("options", {}),
    }
    config = EngineArgs(model=job["model"], **ours, **options).create_engine_config()
    if job.get("async"):
        force_async_scheduling(config)
    return LLMEngine.from_vllm_config(config)


def force_async_scheduling(config: Any) -> None:
    """vLLM turns it off on a CPU, where its model runner lacks nothing but CUDA's streams and
    events; what runs at once has nothing to wait for."""
    from contextlib import nullcontext

    import torch

    class Done:
        device = torch.device("cpu")

        def __init__(self, *_: Any, **__: Any) -> None: ...
        def record(self, *_: Any) -> None: ...
        def synchronize(self) -> None: ...
        def wait_stream(self, *_: Any) -> None: ...

    torch.cuda.Event = torch.cuda.Stream = Done
    torch.cuda.current_stream = Done
    torch.cuda.stream = lambda _: nullcontext()
    config.scheduler_config.async_scheduling = True


def ask(engine: Any, job: dict[str, Any], name: str, priority: int) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    for kind, prompt, how in requests(job):
        if f"{kind}/{name}" in ASKED or (name == "chat" and not kind.startswith("greedy")):
            continue
        how = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **how}
        lora = LoRARequest("tiny", 1, job["lora"]) if job.get("lora") else None
        if structured := how.pop("structured", None):
            how["structured_outputs"] = StructuredOutputsParams(**structured)
        ASKED.add(f"{kind}/{name}")
        engine.add_request(
            f"{kind}/{name}", prompt, SamplingParams(**how), lora_request=lora, priority=priority
        )
        if name == "chat":
            return


ASKED: set[str] = set()


def answers(engine: Any, job: dict[str, Any], name: str, priority: int) -> dict[str, Any]:
    """Ask all requests under that name and wait for them; their tokens and logprobs."""
    ask(engine, job, name, priority)
    done: dict[str, Any] = {}
    num_steps = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                done[output.request_id] = describe(output)
        num_steps += 1
        if priority and num_steps % 40 == 0:
            ask(engine, job, "chat", priority=0)
        if priority and num_steps % job.get("reset_every", sys.maxsize) == 0:
            pause_and_reset(engine.engine_core.engine_core)
    return {key: value for key, value in done.items() if key.endswith(f"/{name}")} | {
        key: value for key, value in done.items() if key.endswith("/chat")
    }


def pause_and_reset(core: Any) -> None:
    """As a loop of reinforcement learning does between two versions of the weights."""
    core.pause_scheduler(mode="keep")
    assert core.scheduler.kv_cache_manager.usage == 0, "KV is still held"
    core.resume_scheduler()


def describe(output: Any) -> dict[str, Any]:
    one = output.outputs[0]
    return {
        "tokens": list(one.token_ids),
        "text": one.text,
        "logprobs": [flat(entry) for entry in one.logprobs or ()],
        "prompt_logprobs": [flat(entry) for entry in output.prompt_logprobs or () if entry],
    }


def flat(entry: Any) -> dict[str, float]:
    return {str(token): value.logprob for token, value in entry.items()}


def free_blocks(engine: Any) -> int:
    core = engine.engine_core.engine_core
    return int(core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def main() -> None:
    engine = make_engine(JOB)
    blocks = [free_blocks(engine)]
    whole = answers(engine, JOB, "whole", priority=0)
    blocks.append(free_blocks(engine))
    engine.reset_prefix_cache()
    stopped = answers(engine, JOB, "stopped", priority=1)
    blocks.append(free_blocks(engine))
    scheduler = engine.engine_core.engine_core.scheduler
    result = {
        "whole": whole,
        "stopped": stopped,
        "free_blocks": blocks,
        "can_stop": not scheduler.stopper.why_off,
        "steps_in_flight": engine.engine_core.engine_core.batch_queue_size,
    }
    Path(JOB["result"]).write_text(json.dumps(result))
    engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
