"""Every command, from the command line's own tree."""

from collections.abc import Iterator
from typing import Any

import typer.main

from conserve.cli.main import app
from scripts.site.reference.markdown import code, prose, table
from scripts.site.reference.markdown import page as page_of

INTRO = """
What `conserve COMMAND --help` prints. Flags of `conserve serve` are on
[a page of their own](flags.md).
""".strip()


def leaves(command: Any, path: str = "conserve") -> Iterator[tuple[str, Any]]:
    """Every command that can be run, by its full name."""
    nested = getattr(command, "commands", None)
    if not nested:
        yield path, command
    for name, each in (nested or {}).items():
        if not each.hidden:
            yield from leaves(each, f"{path} {name}")


def page() -> str:
    parts = [
        part for name, found in leaves(typer.main.get_command(app)) for part in _of(name, found)
    ]
    return page_of("Commands", INTRO, *parts)


def _of(name: str, command: Any) -> Iterator[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    yield f"## {name}"
    yield "    " + " ".join([name, *map(_word, arguments), *(["[OPTIONS]"] if options else [])])
    for paragraph in (command.help or "").split("\n\n"):
        yield prose(paragraph)
    if rows := [(_names(p), _default(p), prose(_help(p))) for p in [*arguments, *options]]:
        yield table(["word", "default", "meaning"], rows)


def _word(argument: Any) -> str:
    word = argument.metavar or argument.name.upper()
    return word if argument.required or word.startswith("[") else f"[{word}]"


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        word = _word(parameter)
        return code(word if "] [" in word else word.strip("[]"))
    return ", ".join(map(code, [*parameter.opts, *parameter.secondary_opts]))


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    default = parameter.default
    if default is None or default is False or callable(default) or default == ():
        return ""
    return code(getattr(default, "value", default))


def _help(parameter: Any) -> str:
    variable = parameter.envvar
    said = parameter.help or ""
    return f"{said} Read from `{variable}` where it is not given." if variable else said
