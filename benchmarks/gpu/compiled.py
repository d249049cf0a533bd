"""vLLM's compilation for GPUs on a CPU, where it compiles a model whole otherwise: by inductor, in
pieces that are cut at every layer's attention."""

from __future__ import annotations

from typing import Any


def compile_in_pieces(runner: str) -> None:
    """To be called before an engine is built."""
    import torch.utils._triton
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    check = current_platform.check_and_update_config

    def checked(config: Any) -> None:
        check(config)
        chosen = config.compilation_config
        chosen.mode, chosen.compile_sizes = CompilationMode.VLLM_COMPILE, []
        chosen.custom_ops = ["none"]

    type(current_platform).check_and_update_config = staticmethod(checked)
    # It names kernels that are built for GPUs alone, and finds none of them in such a graph.
    FixFunctionalizationPass.__call__ = lambda self, graph: None
    # For inductor's cache: the interpreter has no device to name.
    torch.utils._triton.triton_hash_with_backend = lambda: "none"
    if runner == "v2":
        _sample_no_dummies()


def _sample_no_dummies() -> None:
    """No attention is computed in the forward that measures memory. Its numbers are what was in
    memory, and Triton's interpreter stops at those that are none."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    GPUModelRunner._dummy_sampler_run = lambda self, hidden_states: None


def num_pieces() -> int:
    """Of all forwards that were compiled in this process."""
    from vllm.compilation.counter import compilation_counter

    return int(compilation_counter.num_piecewise_graphs_seen)
