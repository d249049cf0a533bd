"""`--config FILE`: flags from a YAML file, as vLLM writes them there.

vLLM's own reader drops every `false` on its way, and knows no default model: `checkpoint: off` and
`enable-prefix-caching: false` would be lost without a word.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from conserve.server.errors import BadInputError

FLAG = "--config"
Actions = Mapping[str, argparse.Action]


def expand(arguments: Sequence[str], actions: Actions) -> list[str]:
    """The arguments with the file's in the place of its name, before the others, which win.

    `actions` are the parser's, by flag. Raises BadInputError, which names the file or the key.
    """
    rest, file = _without_file(arguments)
    if file is None:
        return rest
    words: list[str] = []
    model = [rest.pop(0)] if rest and not rest[0].startswith("-") else []
    for key, value, spelt in _entries(file):
        if key == "model":
            is_given = model or any(re.match("--model(=|$)", word) for word in rest)
            if value is not None and not is_given:
                model = [str(Path(str(value)).expanduser())]
            continue
        words += _words(file, key, value, spelt, actions)
    return [*model, *words, *rest]


def is_on(arguments: Sequence[str], flag: str) -> bool:
    """Whether the file that the arguments name, if any, turns that switch on. For what is asked
    before there is a parser. Raises as `expand` does."""
    _, file = _without_file(arguments)
    entries = _entries(file) if file is not None else ()
    return any(f"--{key.replace('_', '-')}" == flag and value is True for key, value, _ in entries)


def _without_file(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    rest, files = [], []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name == FLAG:
            files.append(value if equals else next(words, ""))
        else:
            rest.append(word)
    if len(files) > 1 or "" in files:
        raise BadInputError(f"{FLAG}: name one YAML file.")
    return rest, files[0] if files else None


def _entries(file: str) -> Iterator[tuple[str, Any, Any]]:
    """Keys, with their values as YAML has them and as they are spelt: `off` is false to YAML."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        values, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"{FLAG}: {file} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise BadInputError(
            f"{FLAG}: {file} is no YAML: {' '.join(str(error).split())}."
        ) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise BadInputError(f"{FLAG}: {file} must hold flags without their dashes, `port: 8000`.")
    spelt = {key.value: _spelling(value) for key, value in node.value}
    for key, value in values.items():
        yield key, _as_spelt(value, spelt.get(key)), spelt.get(key)


def _spelling(node: yaml.Node) -> Any:
    """The text of a value; of a list, that of each."""
    if isinstance(node, yaml.SequenceNode):
        return [_spelling(each) for each in node.value]
    return node.value if isinstance(node, yaml.ScalarNode) else None


def _as_spelt(value: Any, spelt: Any) -> Any:
    """What YAML takes for a number or a date may be a key, a name or a revision to us: `0123` is
    83 to it, `1.10` is 1.1."""
    is_read = isinstance(value, int | float | date) and not isinstance(value, bool)
    return spelt if is_read and isinstance(spelt, str) else value


def _words(file: str, key: str, value: Any, spelt: Any, actions: Actions) -> list[str]:
    """The command line's spelling of one entry."""
    flag = f"--{key.replace('_', '-')}"
    action = actions.get(flag)
    if action is None:
        # Such as `compilation-config.mode`; what is nobody's, the parser refuses.
        return [f"--{key}", _text(value)]
    if action.nargs == 0:
        return _switch(file, key, value, actions)
    if isinstance(value, bool):
        if action.nargs == "?":  # may stand alone
            return [flag] if value else []
        if spelt is None or spelt.lower() in ("true", "false"):
            raise BadInputError(f"{FLAG}: {file}: {key} takes a value, not {_text(value)}.")
        value = spelt
    is_append = isinstance(action, argparse._AppendAction)
    if not isinstance(value, list) or (action.nargs is None and not is_append):
        return [flag, _text(value)]
    texts = [_text(_as_spelt(*each)) for each in zip(value, spelt or value, strict=True)]
    if is_append:
        return [word for text in texts for word in (flag, text)]
    return [flag, *texts] if texts else []


def _switch(file: str, key: str, value: Any, actions: Actions) -> list[str]:
    if not isinstance(value, bool):
        raise BadInputError(f"{FLAG}: {file}: {key} must be true or false, not {_text(value)}.")
    name = key.replace("_", "-")
    if value:
        return [f"--{name}"]
    return [f"--no-{name}"] if f"--no-{name}" in actions else []


def _text(value: Any) -> str:
    if value is None:
        return "None"  # which vLLM takes for what it leaves unset
    return value if isinstance(value, str) else json.dumps(value, default=str)
