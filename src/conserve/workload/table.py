"""The base of everything read from a scenario file: frozen, complete, refused early."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator


class ScenarioError(ValueError):
    """A scenario that cannot be used; names the field and says what to do."""


class Table(BaseModel):
    """One table of a scenario. An unknown key is refused by name with the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> Self:
        """From plain values; `where` begins each error. Raises ScenarioError."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ScenarioError(_explained(error, where)) from error

    @model_validator(mode="before")
    @classmethod
    def _know_every_key(cls, table: Any) -> Any:
        if isinstance(table, Mapping):
            known = list(cls.model_fields)
            for key in table:
                if key not in known:
                    raise ValueError(unknown_name("key", str(key), known))
        return table


def read_toml(path: Path) -> dict[str, Any]:
    """Raises ScenarioError for a file that cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path}: {error}") from error


def unknown_name(what: str, name: str, known: list[str]) -> str:
    """`unknown key 'durations': did you mean 'duration_s'?`, or the list when none is near."""
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
    return f"unknown {what} {name!r}: {hint}"


def _explained(error: ValidationError, where: str) -> str:
    """What pydantic found, one line a field, without its class names and links."""
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        message = _message(item["type"], item.get("ctx", {}), item["msg"])
        lines.append(f"{where}: {field}: {message}" if field else f"{where}: {message}")
    return "\n".join(lines)


def _message(type_: str, context: Mapping[str, Any], message: str) -> str:
    if type_ == "union_tag_invalid":
        kinds = str(context["expected_tags"]).replace("'", "").split(", ")
        return unknown_name("kind", str(context["tag"]), kinds)
    if type_ == "union_tag_not_found":
        return "needs a kind"
    return message.removeprefix("Value error, ")
