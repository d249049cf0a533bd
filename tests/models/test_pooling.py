"""Pooling models on real engines: vectors equal those given alone, whoever else there is, and no
prompt is cut that must not be."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.models import playing
from tests.models.playing import Play, Results
from tests.models.pooling import FAMILIES

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Play:
    """Play families, as `pooling_engine.py` says; what came of each."""

    def run(*families: str, careless: bool = False) -> Results:
        folder = tmp_path_factory.mktemp("pooling")
        return playing.play("pooling_engine", FAMILIES, families, folder, careless=careless)

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
