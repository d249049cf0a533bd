"""Which class a request belongs to."""

from __future__ import annotations

import pytest

from conserve.server.tiers.classes import RequestClass, UnknownTierError, classify

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


@pytest.mark.parametrize("priority", ["high", 1.5, True, None, [1]])
def test_a_priority_that_is_no_integer_is_left_to_vllm(priority: object) -> None:
    assert classify({"priority": priority}) is None


@pytest.mark.parametrize("tier", ["cheap", "", 3, ["flex"], "FLEX"])
def test_an_unknown_tier_is_refused_by_name(tier: object) -> None:
    with pytest.raises(UnknownTierError, match=r"service_tier must be one of .*flex"):
        classify({"service_tier": tier})
