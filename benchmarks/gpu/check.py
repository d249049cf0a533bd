"""Whether everything that run.py imports is there, and whether kernels run: seconds that save
minutes. Each line is one thing; the exit status is 1 if one is not as it should be.

With --bare only what the machine itself has to have, before anything is unpacked.
"""

from __future__ import annotations

import argparse
import mmap
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module, metadata

MODULES = (
    "torch", "transformers", "tokenizers", "vllm", "vllm.entrypoints.openai.api_server",
    "vllm.v1.worker.gpu.model_runner", "vllm.device_allocator.cumem", "conserve.cli.main",
    "conserve.bench.runner", "conserve.bench.load", "conserve.bench.report.write",
    "conserve.server.door", "conserve.server.start.serve", "conserve.server.tiers",
    "conserve.server.dashboard.middleware", "conserve.server.logs.middleware",
    "conserve.server.draining", "conserve.server.redirects", "conserve.engine.scheduler",
    "conserve.engine.connector",
)  # fmt: skip
ON_CUDA = (
    "vllm._C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa3_C", "vllm.v1.worker.gpu_worker",
    "conserve.engine.gpu_worker", "conserve.engine.cuda",
    # Every start imports a model for images here, whatever it serves.
    "vllm.model_executor.warmup.minimax_m3_msa_warmup",
)  # fmt: skip
ON_CPU = ("vllm.v1.worker.cpu_worker", "conserve.engine.cpu_worker")
BARE = (
    "torchvision.transforms", "transformers.image_processing_backends",
    "transformers.processing_utils", "transformers.video_processing_utils",
)  # fmt: skip
"""What that model imports of packages that are not packed."""
PINNED_BYTES = 256 << 20

Check = tuple[str, Callable[[], str]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bare", action="store_true", help="before anything is unpacked")
    checks = bare_checks() if parser.parse_args().bare else all_checks()
    failed = [name for name, check in checks if not passes(name, check)]
    print(f"check: {'all is there' if not failed else 'MISSING ' + ', '.join(failed)}", flush=True)
    return 1 if failed else 0


def bare_checks() -> list[Check]:
    import torch

    if not torch.cuda.is_available():
        return [("torch", partial(imported, "torch"))]
    return [*((name, partial(imported, name)) for name in BARE), ("pinning", pinning)]


def all_checks() -> list[Check]:
    import torch

    on_cuda = torch.cuda.is_available()
    names = (*MODULES, *(ON_CUDA if on_cuda else ON_CPU))
    checks: list[Check] = [("the plugin", plugin)]
    checks += [(name, partial(imported, name)) for name in names]
    checks += [("a kernel of vLLM's", vllm_kernel), ("a Triton kernel", triton_kernel)] * on_cuda
    return checks


def passes(name: str, check: Callable[[], str]) -> bool:
    started = time.monotonic()
    try:
        found = check()
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}", flush=True)
        return False
    seconds = time.monotonic() - started
    if found or seconds > 1:
        print(f"{name}: {found or 'imported'}, {seconds:.1f} s", flush=True)
    return True


def imported(name: str) -> str:
    """The version, where it has one."""
    return str(getattr(import_module(name), "__version__", ""))


def plugin() -> str:
    """ConServe is installed as a package: vLLM finds its plugin by its entry point."""
    (point,) = metadata.entry_points(group="vllm.general_plugins", name="conserve")
    return point.value


def pinning() -> str:
    """How fast memory of the host is pinned, as the pool for checkpoints is."""
    import torch

    pages = mmap.mmap(-1, PINNED_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    address = torch.frombuffer(pages, dtype=torch.int8).data_ptr()
    torch.cuda.init()
    runtime, started = torch.cuda.cudart(), time.monotonic()
    error = runtime.cudaHostRegister(address, PINNED_BYTES, 0)
    seconds = time.monotonic() - started
    if error.value:
        raise MemoryError(f"cudaHostRegister: {error}")
    runtime.cudaHostUnregister(address)
    return f"{PINNED_BYTES / 2**30 / seconds:.1f} GiB/s"


def vllm_kernel() -> str:
    import torch

    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(64, 128, device="cuda", dtype=torch.bfloat16)
    torch.ops._C.silu_and_mul(out, x)
    wanted = torch.nn.functional.silu(x[:, :128].float()) * x[:, 128:].float()
    torch.testing.assert_close(out.float(), wanted, rtol=2e-2, atol=2e-2)
    return f"right on {torch.cuda.get_device_name(0)}"


def triton_kernel() -> str:
    """Needs a C compiler and Python's headers beside Triton itself."""
    import torch
    from check_triton import doubled
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample  # noqa: F401 - Triton's decorators

    x = torch.arange(100, device="cuda", dtype=torch.float32)
    torch.testing.assert_close(doubled(x), 2 * x)
    return "right"


if __name__ == "__main__":
    sys.exit(main())
