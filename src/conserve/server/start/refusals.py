"""What vLLM has against its arguments, in one line instead of a traceback.

Each of its parts raises what it likes: a parser of tool calls that nobody knows is a KeyError, a
flag that another one needs a TypeError. So where it was raised decides, too.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from conserve.server.errors import BadInputError

VALIDATING = frozenset(
    {"configure_logging_from_args", "validate_api_server_args", "validate_parsed_serve_args"}
)
"""vLLM's functions in which every error is about the arguments."""
STARTING = frozenset({"cmd", "run_headless", "run_multi_api_server"})
"""Those that go on to serve: what they raise themselves is."""
CONFIGURING = frozenset({"create_engine_config", "from_cli_args"})
"""In these such kinds are; others are faults of the code."""
KINDS = (
    ValueError,
    KeyError,
    NotImplementedError,
    AssertionError,
    ImportError,
    OSError,
    RuntimeError,
)


@contextmanager
def refused() -> Iterator[None]:
    """Around what vLLM does with the arguments. Raises BadInputError for what it refuses before
    anything is loaded, and lets everything else through."""
    try:
        yield
    except Exception as error:
        words = first_words(error)
        if " " not in words or not _is_about_arguments(error):
            raise
        raise BadInputError(words) from error


def _is_about_arguments(error: Exception) -> bool:
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    if names[-1] in STARTING or not VALIDATING.isdisjoint(names):
        return True
    return not CONFIGURING.isdisjoint(names) and isinstance(error, KINDS)


def first_words(error: Exception) -> str:
    """What it says, on one line; of pydantic's the first complaint, with the field's name."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        says = str(first["msg"]).removeprefix("Value error, ")
        return f"{field}: {says}, not {first['input']!r}" if field else says
    # The text of a KeyError has quotes around it.
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).removeprefix("Error: ").split())


def parsers_words(message: str) -> str:
    """What the parser of the command line says, on one line, without pydantic's advertisement."""
    said = re.sub(r"\s+For further information visit \S+", "", message)
    return " ".join(said.removeprefix("argument ").split())
