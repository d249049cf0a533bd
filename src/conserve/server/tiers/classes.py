"""Which class a request belongs to, from its body and headers.

`service_tier: "flex"` or a `priority` above 0 makes a request offline; everything else is online.
The engine sees the class as the sign of vLLM's `priority`: above 0 is offline, larger is later.
Senders for whom larger is sooner (llm-d, Kubernetes) mean the opposite sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

OFFLINE_PRIORITY = 1
"""Given to a flex request that names no priority above 0 of its own."""

KNOWN_TIERS = ("auto", "default", "flex", "priority", "scale")
"""OpenAI's tiers; all but flex are served online, as soon as possible."""

Tier = Literal["default", "flex"]

_INTEGER = TypeAdapter(int)


class RefusedError(Exception):
    """A request that is answered with an error in OpenAI's envelope, and goes no further."""

    status: int
    headers: Mapping[str, str] = {}

    def envelope(self) -> dict[str, Any]:
        raise NotImplementedError


class BadFieldError(RefusedError):
    """A field of ours holds what it cannot; `param` is its name."""

    status = 400

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param

    def envelope(self) -> dict[str, Any]:
        error = {"message": str(self), "type": "BadRequestError"}
        return {"error": {**error, "param": self.param, "code": self.status}}


class UnknownTierError(BadFieldError):
    """`service_tier` is none of OpenAI's words."""

    def __init__(self, given: object) -> None:
        known = ", ".join(KNOWN_TIERS)
        super().__init__(
            "service_tier",
            f"service_tier must be one of {known}, not {given!r}. "
            "Use 'flex' for offline work, or leave the field out.",
        )


@dataclass(frozen=True, slots=True)
class RequestClass:
    """How a request is served: the tier its response names and the priority vLLM gets."""

    tier: Tier
    priority: int

    @property
    def online(self) -> bool:
        return self.tier == "default"


def classify(
    body: Mapping[str, Any], priority_header: str | None = None, *, higher_first: bool = False
) -> RequestClass | None:
    """The class of a request, or None where its `priority` is no integer (vLLM says so itself).

    higher_first: a larger priority is sooner, and those below 0 are offline. Raises
    UnknownTierError.
    """
    tier = body.get("service_tier")
    if tier is not None and tier not in KNOWN_TIERS:
        raise UnknownTierError(tier)
    priority = named_priority(body, priority_header)
    if priority is None:
        return None
    if higher_first:
        priority = -priority
    if priority > 0:
        return RequestClass("flex", priority)
    if tier == "flex":
        return RequestClass("flex", OFFLINE_PRIORITY)
    return RequestClass("default", priority)


def named_priority(body: Mapping[str, Any], priority_header: str | None) -> int | None:
    """As it was sent: 0 where none was, None where vLLM reads no integer in it.

    One in the header wins over one in the body, as in vLLM; one there that is no integer is
    ignored, as in vLLM.
    """
    in_header = _header_priority(priority_header)
    return _body_priority(body.get("priority", 0)) if in_header is None else in_header


def _body_priority(given: object) -> int | None:
    """As vLLM's protocol reads it: `"0"`, `0.0` and `false` are 0, too. What we would not read, the
    engine would go by all the same: flex work would come as chat."""
    try:
        return _INTEGER.validate_python(given)
    except ValidationError:
        return None


def _header_priority(text: str | None) -> int | None:
    try:
        return None if text is None else int(text)
    except ValueError:
        return None
