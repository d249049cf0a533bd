"""Makes this machine look like one with AVX2 and no AVX-512 to torch, oneDNN and vLLM.

    PYTHONPATH=scripts/avx2_only make test

Python imports this module at every start, so servers, engines and workers that inherit the variable
are masked as well. oneDNN and ATen read their own variables; vLLM picks its kernels, and this
project its data type, by what torch says of the processor. Not masked: what OpenMP, numpy and
the C library choose for themselves, which matters little here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")


def mask(cpu: ModuleType) -> None:
    """Take AVX-512 and AMX from what `torch.cpu` says."""
    for name in ("avx512", "avx512_bf16", "vnni", "amx_tile", "amx_fp16"):
        setattr(cpu, f"_is_{name}_supported", lambda: False)
    capabilities: Callable[[], dict[str, object]] = cpu.get_capabilities

    def without_wide() -> dict[str, object]:
        known = capabilities()
        wide = [name for name in known if name.startswith(("avx512", "avx10", "amx"))]
        return {**known, **dict.fromkeys(wide, False)}

    vars(cpu)["get_capabilities"] = without_wide


class Masking(Loader):
    """Runs the module, then masks it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        mask(module)


class Finder(MetaPathFinder):
    """Finds `torch.cpu` as Python does, to be loaded by `Masking`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torch.cpu":
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = Masking(spec.loader)
        return spec


sys.meta_path.insert(0, Finder())
