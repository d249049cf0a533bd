"""What must hold of every family that has played (`play.py` says what a result has in it)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.models.family import ON, Family

Answers = dict[str, list[float]]


def assert_as_alone(answers: Answers, *, exactly: bool) -> None:
    """Each request answers as it did alone. Tokens are the same; numbers of vectors differ by
    what the order of sums leaves."""
    for name, answer in answers.items():
        alone = answers[f"{name.partition('/')[0]}/alone"]
        assert answer == (alone if exactly else pytest.approx(alone, abs=1e-5)), name


def answered_as_alone(answers: Answers, *, exactly: bool) -> bool:
    try:
        assert_as_alone(answers, exactly=exactly)
    except AssertionError:
        return False
    return True


def assert_answers(family: Family, result: dict[str, Any]) -> None:
    """Every request of both classes was answered, as alone, and the answers mean something."""
    answers, is_writing = result["answers"], family.task == "generate"
    assert {name.split("/")[1] for name in answers} == {"alone", "offline", "online"}
    alone = {tuple(answers[name]) for name in answers if name.endswith("/alone")}
    assert len(alone) == sum(name.endswith("/offline") for name in answers), "prompts matter"
    if is_writing:
        assert all(len(set(answer)) > 3 for answer in answers.values()), "outputs vary"
    assert_as_alone(answers, exactly=is_writing)


def assert_on(family: Family, result: dict[str, Any]) -> None:
    """What is to be on was on, and used; what is off says why."""
    assert result["start"]["stops"] == family.stops
    assert result["start"]["checkpoints"] == family.checkpoints
    assert ("parts of prompts" in result["start"]) != family.cuts_prompts
    assert result["num_groups"] == family.num_groups
    assert result["chunked"] == family.cuts_prompts
    assert bool(result["cut"]) == family.cuts_prompts
    assert (result["stops"] > 2) == (family.stops == ON)
    if family.task == "generate":
        assert result["counts"]["displacements"] > 2
    assert (result["counts"].get("restores", 0) > 2) == (family.checkpoints == ON)


def assert_drafts(result: dict[str, Any], plain: dict[str, Any]) -> None:
    """No answer is another than without drafts (`plain`). As many of the drafts were right as
    alone, so what a drafter keeps outlives stops and restores: all of a model's that drafts for
    itself. Of others, the share differs by prompt, and not all prompts come equally often."""
    counts, counts_alone = result["counts"], result["counts_alone"]
    share = counts_alone["right drafts"] / counts_alone["drafts"]
    made = counts["drafts"] - counts["padding"]
    assert counts["right drafts"] > 40
    assert counts["right drafts"] >= (made if share == 1 else 0.8 * share * made)
    for name, answer in plain["answers"].items():
        if name.endswith("/alone"):
            assert result["answers"][name] == answer, name


def assert_nothing_left(result: dict[str, Any]) -> None:
    """No block, no slot, and no checksum that did not match (`checkpoint_verify`)."""
    assert len(set(result["free_blocks"])) == 1
    assert not result["kept_of_offline"]
    assert "faults" not in result["counts"]


def assert_caught(family: Family, round_of_control: dict[str, Any]) -> None:
    """A round with a negative control shows: a wrong answer, or none, or an engine that dies."""
    if "ended" in round_of_control:
        return
    assert not answered_as_alone(round_of_control["answers"], exactly=family.task == "generate")
