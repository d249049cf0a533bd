"""Model Runner V2 on a CPU: its kernels in Triton's interpreter, which takes CPU tensors."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any


def is_there() -> bool:
    return find_spec("triton") is not None


def interpret_triton() -> None:
    """Let vLLM find Triton usable on a CPU. To be called before vLLM is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.backends as found

    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    found.backends.clear()
    found.backends["cpu"] = found.Backend(compiler=None, driver=driver)


def keep_async_on() -> None:
    """vLLM turns asynchronous scheduling off on CPUs, where its code runs none the less."""
    from vllm.platforms import current_platform

    check = current_platform.check_and_update_config

    def checked(config: Any) -> None:
        check(config)
        config.scheduler_config.async_scheduling = True

    type(current_platform).check_and_update_config = staticmethod(checked)
