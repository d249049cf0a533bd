"""The matrix: families of models on real engines, where bursts of online requests displace offline
ones and steps are stopped at random. `make test` plays a few of them, `make matrix` all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.models import results, speculation
from tests.models.careless import CONTROLS
from tests.models.checks import (
    assert_answers,
    assert_caught,
    assert_drafts,
    assert_nothing_left,
    assert_on,
)
from tests.models.family import ON
from tests.models.playing import Results, play
from tests.models.registry import FAMILIES, KIND_OF

pytestmark = pytest.mark.engine


def marked(names: Iterable[str]) -> list[Any]:
    """Parameters; those that `make test` leaves out are marked."""
    return [
        pytest.param(name, marks=() if FAMILIES[name].always else pytest.mark.matrix)
        for name in names
    ]


PLAYED = marked(name for name, family in FAMILIES.items() if not family.refusal)
Played = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """(family) -> what came of it. All families of its kind that are to be tested play with it, in
    one process; with the negative controls, if one of these is to be tested."""
    calls = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    wanted = {call.params["family"] for call in calls if "family" in call.params}
    careless = any("control" in call.params for call in calls)
    found: Results = {}

    def get(name: str) -> dict[str, Any]:
        if name not in found:
            kind = [
                other
                for other in FAMILIES
                if other == name or (other in wanted and KIND_OF[other] == KIND_OF[name])
            ]
            folder = tmp_path_factory.mktemp(KIND_OF[name])
            found.update(play(kind, folder, careless=careless))
        return found[name]

    return get


@pytest.mark.parametrize("family", PLAYED)
def test_a_family_answers_as_alone_and_leaves_nothing_behind(played: Played, family: str) -> None:
    about, result = FAMILIES[family], played(family)
    assert "ended" not in result, result["ended"]
    assert_answers(about, result)
    assert_on(about, result)
    assert_nothing_left(result)
    if results.KEEP in os.environ:
        results.keep(family, about, result)


@pytest.mark.parametrize("family", marked(speculation.SPECULATING))
def test_drafts_change_no_answer(played: Played, family: str) -> None:
    assert_drafts(played(family), played(speculation.PLAIN))


@pytest.mark.matrix
@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].refusal])
def test_vllm_still_refuses_it_in_the_same_words(played: Played, family: str) -> None:
    about, result = FAMILIES[family], played(family)
    assert about.refusal in result["ended"]
    if results.KEEP in os.environ:
        results.keep(family, about, result)


@pytest.mark.parametrize(
    ("family", "control"),
    [
        pytest.param(name, control, marks=pytest.mark.matrix)
        for name, family in FAMILIES.items()
        for control in CONTROLS
        if not family.refusal and getattr(family, control) == ON
    ],
)
def test_carelessness_is_caught(played: Played, family: str, control: str) -> None:
    assert_caught(FAMILIES[family], played(family)["careless"][control])
