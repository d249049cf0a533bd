"""Ways to start vLLM in which ConServe would be left out, or half of it, without a word."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, MutableMapping

from conserve.server.errors import BadInputError

PLUGINS = "VLLM_PLUGINS"
OUR_PLUGIN = "conserve"
"""Its name, as pyproject.toml has it."""
RUST = "VLLM_USE_RUST_FRONTEND"


def name_our_plugin(environ: MutableMapping[str, str]) -> None:
    """What names some plugins shuts all others out, also the one that hooks our scheduler in. To be
    called before vLLM is imported."""
    named = environ.get(PLUGINS)
    if named is not None and OUR_PLUGIN not in named.split(","):
        environ[PLUGINS] = ",".join(filter(None, [named, OUR_PLUGIN]))


def check(args: argparse.Namespace, environ: Mapping[str, str]) -> None:
    """Raises BadInputError, which names the flag or variable and what to do instead."""
    for holds, what in _reasons(args, environ):
        if holds:
            raise BadInputError(what)


def _reasons(args: argparse.Namespace, environ: Mapping[str, str]) -> Iterator[tuple[bool, str]]:
    yield (
        bool(args.grpc),
        "--grpc starts a server without HTTP: no classes, no batches and no page. "
        "Leave it out, or run vLLM's own command.",
    )
    yield (
        environ.get(RUST, "0") not in ("", "0"),
        f"{RUST} replaces the server in which ConServe tells classes apart and keeps batches. "
        "Unset it.",
    )
    yield (
        args.kv_offloading_size is not None,
        "--kv-offloading-size puts vLLM's copies of KV in the place of ConServe's, without which "
        "no step can be stopped. Name the memory for ours with --checkpoint-bytes instead, or "
        "vLLM's connector with --kv-transfer-config.",
    )
    yield (
        bool(args.lora_modules) and not args.enable_lora,
        "--lora-modules needs --enable-lora.",
    )


def no_servers_is_headless(args: argparse.Namespace) -> None:
    """vLLM has two spellings of a process with engines alone."""
    if args.api_server_count is not None and args.api_server_count < 1:
        args.api_server_count, args.headless = None, True
