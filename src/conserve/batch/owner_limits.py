"""What each owner of batches may have, and its share: a file that who runs the servers writes.

{"default": {"max_queued_requests": 200000}, "DIGEST": {"share": 4, "max_live_batches": 50}}
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from conserve.batch.ids import EVERYBODY
from conserve.batch.webhooks import Webhook

logger = logging.getLogger(__name__)

DEFAULT = "default"
OWNER = re.compile(rf"{DEFAULT}|{EVERYBODY}|[0-9a-f]{{64}}")
MAX_BIGINT = 2**63 - 1

Version = tuple[int, int, int]
"""Of a file: when it was written, when anything of it was changed, and its bytes."""


class OwnerLimits(BaseModel):
    """Of one owner. None is no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
    share: float = Field(default=1.0, ge=0.001, le=1000)
    max_live_batches: int | None = Field(default=None, ge=0, le=MAX_BIGINT)
    max_queued_requests: int | None = Field(default=None, ge=0, le=MAX_BIGINT)
    max_queued_tokens: int | None = Field(default=None, ge=0, le=MAX_BIGINT)
    max_stored_bytes: int | None = Field(default=None, ge=0, le=MAX_BIGINT)
    webhook: Webhook | None = None


class Limits:
    """Every owner's. The file is read again when it has changed; one that is wrong by then is named
    in the log, and what was read before stays.

    Raises ValueError or OSError where it cannot be read at first.
    """

    def __init__(self, path: Path | None, max_live_batches: int) -> None:
        self._path = path
        self._base = OwnerLimits(max_live_batches=max_live_batches)
        self._read_at: Version | None = None
        self._by_owner: Mapping[str, OwnerLimits] = {}
        if path is not None:
            self._read_at, self._by_owner = _version(path), _read(path, self._base)

    def of(self, tenant: str) -> OwnerLimits:
        self._refresh()
        return self._by_owner.get(tenant) or self._by_owner.get(DEFAULT) or self._base

    def share_of(self, tenant: str) -> float:
        return self.of(tenant).share

    def webhook_of(self, tenant: str) -> Webhook | None:
        return self.of(tenant).webhook

    def _refresh(self) -> None:
        """Reads each version of the file once, a wrong one too: this is asked all the time."""
        if self._path is None or (version := _version(self._path)) == self._read_at:
            return
        self._read_at = version
        try:
            self._by_owner = _read(self._path, self._base)
            logger.info("the limits of owners are read again from %s", self._path)
        except (OSError, ValueError) as error:
            logger.warning("the limits of owners stay as they were: %s", error)


def _version(path: Path) -> Version | None:
    """None where there is no such file. A change of its mode makes another version, too."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size


def _read(path: Path, base: OwnerLimits) -> Mapping[str, OwnerLimits]:
    """What an owner's entry leaves out is as `default` has it."""
    try:
        told = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: it is no JSON: {error}") from None
    if not isinstance(told, dict):
        raise ValueError(f"{path}: it must be an object of owners, each with an object of limits")
    for owner in told:
        if not OWNER.fullmatch(owner):
            raise ValueError(
                f"{path}: {owner[:100]!r} is no owner; name {DEFAULT!r}, {EVERYBODY!r} or the "
                "SHA-256 digest of a key, as `conserve batch owners list` shows it"
            )
    default = _limits(path, DEFAULT, base.model_dump(), told.get(DEFAULT, {}))
    inherited = default.model_dump()
    return {owner: _limits(path, owner, inherited, own) for owner, own in told.items()} | {
        DEFAULT: default
    }


def _limits(path: Path, owner: str, inherited: Mapping[str, object], own: object) -> OwnerLimits:
    if not isinstance(own, dict):
        kind = type(own).__name__  # not what it says: that may be a secret
        raise ValueError(f"{path}: {owner}: it must be an object of limits, not {kind}")
    try:
        return OwnerLimits.model_validate({**inherited, **own})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        model = OwnerLimits if len(first["loc"]) == 1 else Webhook
        known = ", ".join(model.model_fields)
        reason = first["msg"] if first["type"] != "extra_forbidden" else f"must be one of {known}"
        raise ValueError(f"{path}: {owner}: {field}: {reason}") from None
