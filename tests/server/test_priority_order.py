"""Which priorities are offline, by what their senders mean with them."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from conserve.engine.batch_line import running_line
from conserve.server.tiers.classes import RequestClass, classify
from conserve.server.tiers.contradictions import contradiction
from conserve.server.tiers.rules import Rules

LINE = f"batch_{0:032x}-0"


@pytest.mark.parametrize(
    ("body", "header", "expected"),
    [
        ({}, None, RequestClass("default", 0)),
        ({"priority": 0}, None, RequestClass("default", 0)),
        ({"priority": -10}, None, RequestClass("flex", 10)),
        ({"priority": 100}, None, RequestClass("default", -100)),
        ({"priority": 3}, "-4", RequestClass("flex", 4)),
        ({"service_tier": "flex"}, None, RequestClass("flex", 1)),
        ({"service_tier": "flex", "priority": -3}, None, RequestClass("flex", 3)),
        ({"service_tier": "flex", "priority": 100}, None, RequestClass("flex", 1)),
    ],
)
def test_larger_may_be_sooner(
    body: dict[str, Any], header: str | None, expected: RequestClass
) -> None:
    """llm-d's critical = 100 and batch = -10, as its router writes them into the body for pods that
    no label calls vLLM's."""
    assert classify(body, header, higher_first=True) == expected


def test_both_orders_agree_on_what_llm_d_means() -> None:
    """Negated for vLLM, and as it is: the same classes, in the same order."""
    for meant in (-10, -1, 0, 1, 100):
        as_it_is = classify({"priority": meant}, higher_first=True)
        assert as_it_is == classify({"priority": -meant})


@pytest.mark.parametrize(
    ("tier", "priority", "order", "said"),
    [
        ("flex", -10, "lower-first", "higher-first"),
        ("flex", 10, "higher-first", "lower-first"),
        ("default", 10, "lower-first", "higher-first"),
        ("priority", -10, "higher-first", "lower-first"),
        ("flex", 10, "lower-first", None),
        ("flex", 0, "lower-first", None),
        ("default", -10, "lower-first", None),
        ("auto", 10, "lower-first", None),
        (None, 10, "lower-first", None),
        (None, -10, "lower-first", None),
    ],
)
def test_what_contradicts_itself(tier: str | None, priority: int, order: str, said: str) -> None:
    text = contradiction(tier, priority, order)
    assert (text is None) == (said is None)
    if text is not None:
        assert f"--priority-order {said}" in text
        assert f"priority {priority}" in text


def rules(order: str) -> Rules:
    """Those of a server that was started with `--priority-order`."""
    config = SimpleNamespace(additional_config={"conserve": {"priority_order": order}})
    return Rules(SimpleNamespace(vllm_config=config, generate=None))


def test_the_first_contradiction_is_logged_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    ours = rules("lower-first")
    with caplog.at_level(logging.WARNING):
        ours.classify({"service_tier": "flex", "priority": 4}, None)
        assert not caplog.records
        ours.classify({"service_tier": "flex"}, "-10")
        ours.classify({"service_tier": "flex", "priority": -10}, None)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "--priority-order higher-first" in caplog.text


def test_lines_of_batches_are_ours_whatever_clients_mean() -> None:
    ours = rules("higher-first")
    assert ours.classify({"priority": -10}, None) == RequestClass("flex", 10)
    with running_line(LINE):
        line = {"service_tier": "flex", "priority": 10}
        assert ours.classify(line, None) == RequestClass("flex", 10)
