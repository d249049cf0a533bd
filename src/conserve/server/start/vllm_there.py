"""Whether the engine is installed: the package without extras has none."""

from __future__ import annotations

from importlib.util import find_spec

from conserve.server.errors import BadInputError

GET_VLLM = (
    "pip install 'conserve-llm[gpu]' on a machine with a GPU, 'conserve-llm[cpu]' on others "
    "(docs/install.md says where pip finds torch for CPUs)."
)


def vllm_is_there() -> bool:
    """Whether some vLLM is installed; nothing is imported."""
    return find_spec("vllm") is not None


def check_vllm() -> None:
    """Raise BadInputError where no vLLM is installed."""
    if not vllm_is_there():
        raise BadInputError(f"this needs vLLM, which is not installed: {GET_VLLM}")
