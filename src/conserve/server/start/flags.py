"""Our own flags of `conserve serve`, beside every flag of `vllm serve`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from conserve.engine.settings import CHECKPOINT_MODES, EngineSettings
from conserve.server.errors import BadInputError
from conserve.server.start import values
from conserve.server.start.default_model import cache_folder

DEFAULTS = EngineSettings()


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag: its name, how its text is read, its default and a sentence of help."""

    name: str
    parse: Callable[[str], Any] | None
    """None for a switch, which takes no text."""
    default: object
    metavar: str
    help: str


def flags() -> tuple[Flag, ...]:
    """All of them; a function, because one default depends on the environment."""
    return (
        Flag(
            "--slo-ttft-ms",
            values.target,
            values.AUTO,
            "MS",
            "Target for the time to first token of online requests, in milliseconds; auto takes "
            "it from what the machine does alone. A lower target leaves offline work fewer and "
            "smaller steps.",
        ),
        Flag(
            "--slo-tbt-ms",
            values.target,
            values.AUTO,
            "MS",
            "Target for the gap between two tokens of an online request, in milliseconds; auto "
            "takes it from what the machine does alone. A lower target means smaller steps while "
            "online requests run, so fewer offline tokens.",
        ),
        Flag(
            "--slo-min-share",
            values.part,
            DEFAULTS.slo_min_share,
            "SHARE",
            "How much shorter than the server's a target may be that a request names itself: no "
            "less than this share of it, from 0 to 1. Shorter ones count as that; 1 lets requests "
            "ask for longer ones only.",
        ),
        Flag(
            "--chat-slowdown",
            values.slowdown,
            None,
            "LEVEL",
            "How many times as far apart as alone tokens of online requests may come, for the sake "
            "of offline work: a number such as 1.3, or gentle (1.1), balanced (1.5, the default), "
            "greedy (the targets alone say). The targets hold all the same.",
        ),
        Flag(
            "--offline-floor",
            values.share,
            DEFAULTS.offline_floor,
            "SHARE",
            "Share of step time, from 0 up to but not 1, that offline work gets even where the "
            "targets suffer. 0 lets it starve while online requests need everything.",
        ),
        Flag(
            "--profile-dir",
            str,
            str(cache_folder() / "profiles"),
            "DIR",
            "Folder where latency models are kept between starts. "
            f"Without a stored one the start takes {DEFAULTS.profile_seconds:.0f} seconds longer, "
            "and up to twice that where steps are slow.",
        ),
        Flag(
            "--checkpoint",
            values.one_of(CHECKPOINT_MODES),
            DEFAULTS.checkpoint,
            "MODE",
            "What is kept on the host of the KV of offline requests, so that one that must make "
            "room need not compute it again: incremental copies it as it grows, swap when the "
            "request is displaced (an arrival then waits for the copy), off keeps nothing.",
        ),
        Flag(
            "--no-checkpoint-online",
            None,
            False,
            "",
            "Keep no KV of online requests on the host. Otherwise what the copies of offline "
            "requests leave of the budget goes to them, so that the next turn of a conversation "
            "need not compute what it has in common with the last.",
        ),
        Flag(
            "--checkpoint-bytes",
            values.size,
            None,
            "SIZE",
            "Host memory for those copies, such as 8GiB, over all ranks and replicas on this "
            "host. By default a quarter of what is free, at most four times the KV cache.",
        ),
        Flag(
            "--checkpoint-dir",
            values.folder,
            None,
            "DIR",
            "Folder for a second, slower tier on a local disk, where copies go before they are "
            "given up. Needs --checkpoint-dir-bytes.",
        ),
        Flag(
            "--checkpoint-dir-bytes",
            values.size,
            None,
            "SIZE",
            "Size of that tier, such as 50GiB, over all ranks and replicas on this host; all of "
            "it is taken at start and given back at the end.",
        ),
        Flag(
            "--data-dir",
            values.folder,
            None,
            "DIR",
            "Folder for files and batches: the uploads, the results and their database. Servers "
            "that share one share the work of each model they have in common. By default a folder "
            "of the model's own in $XDG_DATA_HOME/conserve.",
        ),
        Flag(
            "--max-live-batches",
            values.count,
            None,
            "N",
            "Batches of one API key that have not ended, 1000 by default; more are refused with "
            "status 429 until one ends.",
        ),
        Flag(
            "--owner-limits",
            values.file,
            None,
            "FILE",
            "JSON file of what each API key may have queued and stored, and its share of the "
            "harvest beside others'. Without it shares are equal; read again when it changes.",
        ),
        Flag(
            "--no-batches",
            None,
            False,
            "",
            "Serve no /v1/files and /v1/batches, and write no data folder.",
        ),
        Flag(
            "--no-dashboard",
            None,
            False,
            "",
            "Serve no /dashboard, the live page, and keep no history for it.",
        ),
        Flag(
            "--log-interval-s",
            values.interval,
            60.0,
            "SECONDS",
            "Seconds between two lines of what matters: latency against the targets, harvest, "
            "stops, batches. Nothing is logged while the server is idle; 0 logs none at all.",
        ),
        Flag(
            "--log-json",
            None,
            False,
            "",
            "Log one JSON object a line, in every process of the server.",
        ),
    )


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


def check_early(arguments: Sequence[str]) -> None:
    """Raise BadInputError for a wrong value of ours, before vLLM is imported (about 10 s)."""
    parser = _EarlyParser(add_help=False, allow_abbrev=False)
    add_to(parser)
    parser.parse_known_args(list(arguments))
