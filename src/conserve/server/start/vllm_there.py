"""Whether there is an engine, and one that ConServe is tried with: the package without extras has
none, and `--allow-untested-vllm` says whether to serve with another."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from conserve.engine import versions
from conserve.server.errors import BadInputError
from conserve.server.start import config_file, flags


def check_vllm() -> None:
    """Raise BadInputError where no vLLM is installed, or one that is neither tried nor allowed;
    nothing is imported."""
    try:
        versions.check()
    except versions.UntestedVllmError as error:
        raise BadInputError(str(error)) from error


def check_or_allow(arguments: Sequence[str]) -> None:
    """The same, and whatever else is wrong with our flags, before vLLM is imported."""
    early = flags.read_early(arguments)
    if early.allow_untested_vllm or config_file.is_on(arguments, versions.FLAG):
        versions.allow()
    check_vllm()


def describe(args: argparse.Namespace, version: str) -> Iterator[tuple[str, str]]:
    """Take the flag out of `args`; a line of the start where there is something to be warned of."""
    del args.allow_untested_vllm
    if uncertain := versions.warning(version):
        yield "warning", f"{uncertain}; outputs may be wrong, and steps fail"
