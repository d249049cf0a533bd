"""A request's own latency targets, from its headers or fields of the same names in its body.

The engine gets them as `vllm_xargs`, which vLLM hands on with the sampling parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from conserve.engine.promises import TBT_ARG, TTFT_ARG
from conserve.server.tiers.classes import BadFieldError

NAMES: Mapping[str, Sequence[str]] = {
    TTFT_ARG: ("x-slo-ttft-ms", "x-llm-d-slo-ttft-ms"),
    TBT_ARG: ("x-slo-tbt-ms", "x-slo-tpot-ms", "x-llm-d-slo-tpot-ms"),
}
"""What the engine reads -> the names that say it, of which the first found counts. Gateways of
llm-d know those with tpot."""
HEADERS = frozenset(name.encode() for names in NAMES.values() for name in names)
XARGS = "vllm_xargs"


class BadTargetError(BadFieldError):
    """A target is no number of milliseconds above 0."""

    def __init__(self, name: str, given: object) -> None:
        super().__init__(name, f"{name} must be a number of milliseconds above 0, not {given!r}.")


def move_targets(body: MutableMapping[str, Any], headers: Mapping[str, str]) -> None:
    """Take the targets out of the body and put them where the engine finds them; a header wins
    over a field. Raises BadTargetError."""
    found: dict[str, float] = {}
    for argument, names in NAMES.items():
        in_body = {name: body.pop(name) for name in names if name in body}
        given = {**in_body, **{name: headers[name] for name in names if name in headers}}
        values = [_seconds(name, given[name]) for name in names if given.get(name) is not None]
        if values:
            found[argument] = values[0]
    xargs = body.get(XARGS)
    if found and (xargs is None or isinstance(xargs, dict)):  # others vLLM refuses itself
        body[XARGS] = {**(xargs or {}), **found}


def _seconds(name: str, given: object) -> float:
    value = math.nan
    if isinstance(given, str | int | float) and not isinstance(given, bool):
        try:
            value = float(given)
        except (ValueError, OverflowError):
            value = math.nan
    if not 0 < value < math.inf:
        raise BadTargetError(name, given)
    return value / 1000
