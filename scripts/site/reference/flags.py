"""Our flags of `conserve serve`, from its own parser's table."""

from collections.abc import Iterator
from pathlib import Path

from conserve.server.start.flag import Flag
from conserve.server.start.flags import flags
from scripts.site.reference.markdown import code, prose
from scripts.site.reference.markdown import page as page_of

INTRO = """
Every flag of `vllm serve` works; these are ours beside them. [Serving](../docs/serving.md) says
what each costs and what is set for you, and `conserve serve --help=all` prints vLLM's as well.
""".strip()


def page() -> str:
    return page_of("Flags", INTRO, *(part for flag in flags() for part in _of(flag)))


def _of(flag: Flag) -> Iterator[str]:
    shown = f"{flag.name} {flag.metavar}".strip()
    yield f"## `{flag.name}`"
    yield f"{code(shown)}{_default(flag)}"
    yield prose(flag.help)


def _default(flag: Flag) -> str:
    if flag.parse is None:
        return ", off by default"
    if flag.default is None:
        return ""
    # A folder of whoever builds this is not the reader's.
    return f", by default {code(str(flag.default).replace(str(Path.home()), '~'))}"
