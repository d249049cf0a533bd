"""Which class a request belongs to."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from conserve.server.tiers.classes import (
    RequestClass,
    UnknownTierError,
    classify,
    named_priority,
)

ONLINE = RequestClass("default", 0)


@pytest.mark.parametrize("tier", ["auto", "default", "priority", "scale", None])
def test_every_tier_but_flex_is_online(tier: str | None) -> None:
    assert classify({"service_tier": tier}) == ONLINE


def test_no_tier_is_online() -> None:
    assert classify({}) == ONLINE


def test_flex_is_offline_with_a_priority_of_its_own() -> None:
    assert classify({"service_tier": "flex"}) == RequestClass("flex", 1)


@pytest.mark.parametrize(("given", "used"), [(7, 7), (1, 1), (0, 1), (-3, 1)])
def test_flex_keeps_a_priority_above_0(given: int, used: int) -> None:
    assert classify({"service_tier": "flex", "priority": given}) == RequestClass("flex", used)


@pytest.mark.parametrize("tier", ["auto", "default", None])
def test_a_priority_above_0_is_offline_whatever_the_tier(tier: str | None) -> None:
    assert classify({"service_tier": tier, "priority": 5}) == RequestClass("flex", 5)


def test_a_negative_priority_stays_online_and_as_it_is() -> None:
    assert classify({"priority": -2}) == RequestClass("default", -2)


@pytest.mark.parametrize(
    ("header", "body", "expected"),
    [
        ("4", {"priority": 0}, RequestClass("flex", 4)),
        ("0", {"priority": 4}, ONLINE),
        ("0", {"service_tier": "flex"}, RequestClass("flex", 1)),
        ("soon", {"priority": 4}, RequestClass("flex", 4)),
    ],
)
def test_the_header_wins_over_the_body(
    header: str, body: dict[str, object], expected: RequestClass
) -> None:
    assert classify(body, header) == expected


NO_INTEGERS = ["high", 1.5, None, [1], {}, ""]


@pytest.mark.parametrize("priority", NO_INTEGERS)
def test_a_priority_that_is_no_integer_is_left_to_vllm(priority: object) -> None:
    assert classify({"priority": priority}) is None


OTHERWISE_SPELT = [0.0, "0", False, -0.0, "-3", -3.0, 2.0, "2", " 2 ", "2.0", True]


@pytest.mark.parametrize("priority", OTHERWISE_SPELT)
def test_flex_work_is_offline_however_its_priority_is_spelt(priority: object) -> None:
    """Spreadsheets and scripts write whole numbers so, and vLLM takes them."""
    found = classify({"service_tier": "flex", "priority": priority})
    assert found is not None
    assert (found.tier, found.priority >= 1) == ("flex", True)


@pytest.mark.parametrize(("given", "used"), [("5", 5), (5.0, 5), (True, 1), ("-5", -5)])
def test_so_is_who_names_nothing_but_a_priority(given: object, used: int) -> None:
    tier = "flex" if used > 0 else "default"
    assert classify({"priority": given}) == RequestClass(tier, used)  # type: ignore[arg-type]
    turned = RequestClass("default" if used > 0 else "flex", -used)
    assert classify({"priority": given}, higher_first=True) == turned


@pytest.mark.engine
@pytest.mark.parametrize("priority", [*NO_INTEGERS, *OTHERWISE_SPELT])
def test_vllm_reads_the_same(priority: object) -> None:
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    ours = named_priority({"priority": priority}, None)
    try:
        theirs = CompletionRequest.model_validate({"prompt": "a", "priority": priority}).priority
    except ValidationError:
        assert ours is None
    else:
        assert ours == theirs


@pytest.mark.parametrize("tier", ["cheap", "", 3, ["flex"], "FLEX"])
def test_an_unknown_tier_is_refused_by_name(tier: object) -> None:
    with pytest.raises(UnknownTierError, match=r"service_tier must be one of .*flex"):
        classify({"service_tier": tier})
