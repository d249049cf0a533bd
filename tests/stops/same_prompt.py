"""A real engine on the tiny model that speculates by n-grams, asked the same prompt three times:
one block and one token, so that the prefix cache leaves one token to compute.

    python -m tests.stops.same_prompt MODEL

Writes a JSON list of (cached tokens, answer's tokens), one a request.
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any

from tests.stops.tiny_llama import random_text

BLOCK_SIZE = 128
SPECULATION = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}


def make_engine(model: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from conserve.engine import plugin
    from conserve.engine.launch import vllm_arguments
    from conserve.engine.settings import EngineSettings

    plugin.register()
    config = EngineArgs(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        kv_cache_memory_bytes=16 << 20,
        block_size=BLOCK_SIZE,
        speculative_config=SPECULATION,
        **vllm_arguments(EngineSettings(profile_seconds=0)),
    ).create_engine_config()
    return LLMEngine.from_vllm_config(config)


def answer(engine: Any, name: str, prompt: str, priority: int) -> tuple[int, list[int]]:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    engine.add_request(name, prompt, params, priority=priority)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                return output.num_cached_tokens, list(output.outputs[0].token_ids)
    raise RuntimeError(f"{name} was not answered")


def main(model: str) -> None:
    engine = make_engine(model)
    prompt = random_text(random.Random(1), BLOCK_SIZE + 1)
    answers = [answer(engine, f"r{i}", prompt, priority=i % 2) for i in range(3)]
    engine.engine_core.shutdown()
    sys.stdout.write(json.dumps(answers) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
