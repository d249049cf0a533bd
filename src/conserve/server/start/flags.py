"""Our own flags of `conserve serve`, beside every flag of `vllm serve`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from conserve.server.errors import BadInputError
from conserve.server.start.engine_flags import engine_flags
from conserve.server.start.flag import Flag
from conserve.server.start.service_flags import SERVICE_FLAGS


def flags() -> tuple[Flag, ...]:
    """All of them, in the order of the help."""
    return (*engine_flags(), *SERVICE_FLAGS)


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add our flags as a group of their own."""
    group = parser.add_argument_group("ConServe", "Targets of online requests, and offline work.")
    for flag in flags():
        if flag.parse is None:
            group.add_argument(flag.name, action="store_true", help=flag.help)
            continue
        group.add_argument(
            flag.name,
            type=flag.parse,
            default=flag.default,
            metavar=flag.metavar,
            help=flag.help,
        )


class _EarlyParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInputError(message.removeprefix("argument "))


def read_early(arguments: Sequence[str]) -> argparse.Namespace:
    """Ours on the command line, before vLLM is imported (about 10 s). Raises BadInputError for a
    wrong value."""
    parser = _EarlyParser(add_help=False, allow_abbrev=False)
    add_to(parser)
    return parser.parse_known_args(list(arguments))[0]
