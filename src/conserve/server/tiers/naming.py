"""A request's tier, written into what vLLM answers."""

from __future__ import annotations

import json

from conserve.server.tiers.bodies import json_object
from conserve.server.tiers.classes import RequestClass
from conserve.server.tiers.paths import ECHOING
from conserve.server.tiers.usage import complete

_EVENT = b"data: {"
_ERROR_EVENT = b'data: {"error"'


def named_json(raw: bytes, found: RequestClass, path: str) -> bytes:
    """A response object with `service_tier`, and all that a flex one's usage is to hold."""
    if (body := json_object(raw)) is None:
        return raw
    body["service_tier"] = found.tier
    if path != ECHOING and not found.online:
        complete(body.get("usage"))
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def named_event(event: bytes, found: RequestClass, path: str) -> bytes:
    """A chunk with `service_tier`; vLLM sends each event as one message.

    Inside a JSON string a quote is escaped, so the quoted words can only be keys.
    """
    if not event.startswith(_EVENT) or event.startswith(_ERROR_EVENT):
        return event
    if b'"service_tier"' in event or (b'"usage":{' in event and not found.online):
        data, end, rest = event.removeprefix(b"data: ").partition(b"\n\n")
        return b"data: " + named_json(data, found, path) + end + rest
    return b'data: {"service_tier":"%s",%s' % (found.tier.encode(), event[len(_EVENT) :])
