"""Models with windows on real engines: displaced requests come back, in all KV groups, and answer
as they do alone."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.models import playing
from tests.models.playing import Play, Results
from tests.models.windows import FAMILIES

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Play:
    """Play families, as `windows_engine.py` says; what came of each."""

    def run(*families: str, careless: bool = False) -> Results:
        folder = tmp_path_factory.mktemp("windows")
        return playing.play("windows_engine", FAMILIES, families, folder, careless=careless)

    return run


@pytest.fixture(scope="module")
def played(play: Play) -> Results:
    """All of them in one process, which imports vLLM once."""
    return play(*FAMILIES)


def assert_as_alone(answers: dict[str, list[int]]) -> None:
    for name, answer in answers.items():
        assert answer == answers[f"{name.partition('/')[0]}/alone"], name


@pytest.mark.parametrize("family", FAMILIES)
def test_displaced_requests_answer_as_they_do_alone(played: Results, family: str) -> None:
    result = played[family]
    answers, counts = result["answers"], result["counts"]
    assert {name.split("/")[1] for name in answers} == {"alone", "offline", "online"}
    alone = {tuple(answers[name]) for name in answers if name.endswith("/alone")}
    assert len(alone) == sum(name.endswith("/offline") for name in answers), "prompts matter"
    assert all(len(set(answer)) > 3 for answer in answers.values()), "outputs vary"
    assert result["num_groups"] == FAMILIES[family].num_groups
    assert not result["unusable"]
    assert counts["displacements"] > 2
    assert counts["restores"] > 2
    assert result["stops"] > 2
    assert_as_alone(answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_leaks(played: Results, family: str) -> None:
    result = played[family]
    assert len(set(result["free_blocks"])) == 1
    assert not result["kept_of_offline"]
    assert "faults" not in result["counts"]


@pytest.mark.long
def test_a_restore_of_one_group_alone_is_caught(play: Play) -> None:
    """The negative control."""
    with pytest.raises(AssertionError):
        assert_as_alone(play("gemma3", careless=True)["gemma3"]["answers"])
