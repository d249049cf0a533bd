"""Requests to the engine, as vLLM's server hands them to its output processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreRequest


def engine_request(
    name: str,
    prompt: Sequence[int],
    sampling: Any,
    *,
    pooling: Any = None,
    lora: str | None = None,
    **more: Any,
) -> EngineCoreRequest:
    """`more`: fields of vLLM's that have a default."""
    return EngineCoreRequest(
        name,
        list(prompt),
        None,
        sampling,
        pooling,
        0.0,
        LoRARequest(lora, 1, "/nowhere") if lora else None,
        None,
        None,
        external_req_id=name,
        **more,
    )
