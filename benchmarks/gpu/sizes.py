"""The engine's sizes, the same for every server and probe of a run: what the first start compiled
is then found by the others (vLLM's cache has them in its key)."""

from __future__ import annotations

import json
import os
from typing import Any

ON_GPU: dict[str, Any] = {
    # Those of vLLM's server on a GPU with 70 GB or more.
    "max_num_seqs": 1024,
    "max_num_batched_tokens": 8192,
    "max_model_len": 36864,
    # A fifth of those that vLLM captures by itself: seconds at each start.
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]},
}
TINY: dict[str, Any] = {
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "max_model_len": 512,
    "enforce_eager": True,
    "dtype": "float32",
    "kv_cache_memory_bytes": 1 << 26,
}


def engine_arguments(*, tiny: bool) -> dict[str, Any]:
    """Of `vllm.LLM`. What ENGINE_ARGS has, as JSON, comes on top: first aid where an engine does
    not start, such as {"enforce_eager": true}."""
    first_aid = json.loads(os.environ.get("ENGINE_ARGS", "{}"))
    return {"load_format": "dummy", **(TINY if tiny else ON_GPU), **first_aid}


def server_arguments(*, tiny: bool) -> list[str]:
    """The same, of a server."""
    return [_flag(name, value) for name, value in engine_arguments(tiny=tiny).items()]


def _flag(name: str, value: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    if value is True:
        return flag
    return f"{flag}={json.dumps(value) if isinstance(value, dict) else value}"
