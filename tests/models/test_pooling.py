"""Pooling models on real engines: vectors equal those given alone, whoever else there is, and no
prompt is cut that must not be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.models.pooling import FAMILIES

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # The models are too small for more than a thread.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
Results = dict[str, dict[str, Any]]
Play = Callable[..., Results]


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Play:
    """Play families, as `pooling_engine.py` says; what came of each."""

    def run(*families: str, careless: bool = False) -> Results:
        folder = tmp_path_factory.mktemp("pooling")
        models = {name: str(FAMILIES[name].make(folder / name)) for name in families}
        result, arguments = folder / "result", ["careless"] if careless else []
        program = [sys.executable, "-m", "tests.models.pooling_engine"]
        done = subprocess.run(
            [*program, json.dumps(models), str(result), *arguments],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        found: Results = json.loads(result.read_text())
        return found

    return run


@pytest.fixture(scope="module")
def played(play: Play) -> Results:
    """All of them in one process, which imports vLLM once."""
    return play(*FAMILIES)


def assert_as_alone(vectors: dict[str, list[float]]) -> None:
    for name, vector in vectors.items():
        alone = vectors[f"{name.partition('/')[0]}/alone"]
        assert len(vector) == len(alone), name
        assert vector == pytest.approx(alone, abs=1e-5), name


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_those_given_alone(played: Results, family: str) -> None:
    result = played[family]
    vectors = result["vectors"]
    kinds = {name.partition("/")[2] for name in vectors}
    assert kinds == {"alone", "offline", "online"}
    assert len(vectors) % 3 == 0
    assert len({tuple(vector) for vector in vectors.values()}) >= len(vectors) / 3
    assert len(result["stops"]) > 2, "else this shows less than it says"
    assert_as_alone(vectors)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_cut_where_they_may_be_and_nowhere_else(played: Results, family: str) -> None:
    result = played[family]
    assert result["chunked"] == FAMILIES[family].cuts_prompts
    assert bool(result["cut"]) == result["chunked"]


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_timed_at_start(played: Results, family: str) -> None:
    assert played[family]["profiled"]


@pytest.mark.long
def test_pooling_what_was_stopped_is_caught(play: Play) -> None:
    """The negative control: what was stopped leaves rows without a meaning among a prompt's."""
    result = play("every-token", careless=True)["every-token"]
    with pytest.raises(AssertionError):
        assert_as_alone(result["vectors"])
