"""One contract, two engines: the simulator, and vLLM's scheduler under our policy."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# The worlds of this folder, and the pretend device with its step loops.
sys.path[:0] = [str(HERE), str(HERE.parent / "engine")]

from situation import Play  # noqa: E402  (found through the line above)

KINDS = ("sim", pytest.param("engine", marks=pytest.mark.engine))


@pytest.fixture(params=KINDS)
def play(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Play]:
    """Plays a situation on the engine of that name."""
    if request.param == "sim":
        import simulated

        yield simulated.play
        return
    pytest.importorskip("vllm")
    import real

    yield partial(real.play, tmp_path)
