"""One contract, two engines: the simulator, and vLLM's scheduler under our policy."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.contract.situation import Play

KINDS = ("sim", pytest.param("engine", marks=pytest.mark.engine))


@pytest.fixture(params=KINDS)
def play(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Play]:
    """Plays a situation on the engine of that name."""
    if request.param == "sim":
        from tests.contract import simulated

        yield simulated.play
        return
    pytest.importorskip("vllm")
    from tests.contract import real

    yield partial(real.play, tmp_path)
