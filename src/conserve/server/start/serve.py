"""`conserve serve`: vLLM's OpenAI server in this process, with our scheduler and classes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from conserve.engine import phases
from conserve.server.errors import EngineDiedError
from conserve.server.start import (
    address,
    checkpoints,
    config_file,
    cpu,
    engine,
    flags,
    interrupts,
    middleware,
    model,
    no_start,
    progress,
    tls,
    unsupported,
    vllm_there,
)

CHOSEN = ("enforce_eager", "enable_prompt_tokens_details")
"""vLLM's arguments whose default we choose; a user's value stands."""


@dataclass(frozen=True)
class Prepared:
    """vLLM's arguments as they are served with, and what was chosen, a name and a text each."""

    args: argparse.Namespace
    lines: list[tuple[str, str]]
    as_json: bool


def serve(arguments: Sequence[str]) -> None:
    """Parse `[MODEL] [flags]`, prepare, and serve until a signal ends it.

    Raises BadInputError before any model is loaded, StartError where the engine does not start, and
    EngineDiedError where it ends before the server is told to.
    """
    vllm_there.check_or_allow(arguments)
    with progress.shown(as_json=logs_json(arguments)) as start:
        phases.begin(phases.IMPORTING)
        ready = prepare(arguments)
        from conserve.server import door

        with start.aside():
            announce(door.version(), ready.lines, as_json=ready.as_json)
        start.ends(*end_of(ready.args))
        phases.begin(phases.ENGINE)
        on_cpu = door.on_cpu()
        with no_start.explained(on_cpu=on_cpu), interrupts.ours_until(lambda: start.is_over):
            door.run(ready.args)
    _check_engine()


def _check_engine() -> None:
    from conserve.server.draining import engine_died

    if engine_died.is_set():
        raise EngineDiedError("the engine has ended by itself, and the server with it (see above).")


def logs_json(arguments: Sequence[str]) -> bool:
    """Known before vLLM's parser is."""
    flag = "--log-json"
    return bool(flags.read_early(arguments).log_json) or config_file.is_on(arguments, flag)


def end_of(args: argparse.Namespace) -> tuple[str, str, Callable[[], bool]]:
    """The last phase of the start, what to say then, and whether it is time to."""
    if args.headless:
        return phases.API, "ready for the API servers", lambda: True
    url = args.uds or address.url_of(args, "")
    return phases.READY, f"ready at {url}", lambda: address.is_open(args)


def prepare(arguments: Sequence[str]) -> Prepared:
    """All that is settled before vLLM starts, the process's environment included. Raises
    BadInputError."""
    vllm_there.check_or_allow(arguments)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    unsupported.name_our_plugin(os.environ)
    from conserve.engine.host_memory import available_bytes
    from conserve.server import door  # brings vLLM, which takes seconds to import

    parsed = door.parse(arguments, flags.add_to, config_file.expand, engine.OWNED + CHOSEN)
    args = parsed.args
    _check(args)
    as_json = vars(args).pop("log_json")
    if as_json:
        door.log_json(args)
    copies = checkpoints.take_flags(args, available_bytes)
    settings = engine.take_settings(args, copies)
    lines = [("model", model.choose_model(args))]
    lines.extend(vllm_there.describe(args, door.version()))
    lines.append(("targets", engine.describe_targets(settings)))
    lines.append(("batches", middleware.choose_batches(args)))
    lines.append(("KV copies", checkpoints.describe(copies, available_bytes)))
    lines.append(("page", middleware.choose_dashboard(args)))
    if door.on_cpu():
        lines.append(("cpu", cpu.tune(args, available_bytes)))
    engine.apply_settings(args, parsed.withheld, settings)
    middleware.add_always(args)
    return Prepared(args, lines, as_json)


def _check(args: argparse.Namespace) -> None:
    """What vLLM would find out minutes later, or not at all. Raises BadInputError."""
    unsupported.check(args, os.environ)
    unsupported.no_servers_is_headless(args)
    address.check_address(args)
    tls.check(args)
    middleware.check_theirs(args)


def announce(vllm_version: str, lines: Sequence[tuple[str, str]], *, as_json: bool) -> None:
    """Say in a few lines on stderr, or in one JSON object, what was chosen."""
    if as_json:
        words = {"message": f"ConServe on vLLM {vllm_version}", "conserve": dict(lines)}
        sys.stderr.write(json.dumps(words) + "\n")
        return
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[bold]ConServe[/] on vLLM {vllm_version}")
    for name, text in lines:
        console.print(f"  [bold]{name:9}[/] {escape(text)}")
