"""`conserve serve`: vLLM's OpenAI server in this process, with our scheduler and classes."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from conserve.server import cpu, flags
from conserve.server.errors import BadInputError
from conserve.server.model import NAME, default_model

if TYPE_CHECKING:
    from conserve.engine.settings import EngineSettings

MIDDLEWARE = "conserve.server.tiers.ServiceTierMiddleware"

OWNED = ("scheduler_cls", "scheduling_policy", "worker_cls", "kv_transfer_config")
"""vLLM's arguments that the engine room may set; a user's other value is refused."""


def serve(arguments: Sequence[str]) -> None:
    """Parse `[MODEL] [flags]`, prepare, and serve until a signal ends it.

    Raises BadInputError before any model is loaded.
    """
    flags.check_early(arguments)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from conserve.server import door  # brings vLLM, which takes seconds to import

    parsed = door.parse(arguments, flags.add_to, OWNED)
    args = parsed.args
    check_port(args)
    lines = [("model", choose_model(args))]
    settings = take_settings(args)
    lines.append(("targets", describe_targets(settings)))
    if door.on_cpu():
        lines.append(("cpu", tune_cpu(args, door.available_memory_bytes)))
    apply_engine(args, parsed.withheld, settings)
    args.middleware = [MIDDLEWARE, *args.middleware]
    announce(door.version(), lines)
    door.run(args)


def choose_model(args: argparse.Namespace) -> str:
    """Settle which model is served, the default one included; says which and where it is."""
    from conserve.server import door, hub

    if args.model_tag is None and args.model == door.DEFAULT_MODEL:
        folder = default_model()
        args.model_tag = str(folder)
        args.served_model_name = args.served_model_name or [NAME]
    else:
        args.model_tag = args.model_tag or args.model
        hub.check_model(args.model_tag, args.revision)
    if hub.is_local(args.model_tag) and "HF_HUB_OFFLINE" not in os.environ:
        os.environ["HF_HUB_OFFLINE"] = "1"
        door.stay_offline()
    names = args.served_model_name
    return f"{names[0]} ({args.model_tag})" if names else str(args.model_tag)


def check_port(args: argparse.Namespace) -> None:
    """Raise BadInputError when the address cannot be bound, before minutes of loading."""
    if args.uds or args.headless:
        return
    host = args.host or ""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, args.port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise BadInputError(
                f"cannot listen on port {args.port} of {host or 'this machine'}: {reason}. "
                "Free it, or name another with --port."
            ) from error


def take_settings(args: argparse.Namespace) -> EngineSettings:
    """Our flags as the engine's settings, taken out of vLLM's arguments."""
    from conserve.engine.settings import EngineSettings

    folder = Path(args.profile_dir).expanduser().absolute()
    settings = EngineSettings(
        slo_ttft_s=args.slo_ttft_ms / 1000,
        slo_tbt_s=args.slo_tbt_ms / 1000,
        offline_floor=args.offline_floor,
        profile_dir=str(folder),
    )
    for flag in flags.flags():
        delattr(args, flag.name.removeprefix("--").replace("-", "_"))
    return settings


def apply_engine(
    args: argparse.Namespace, withheld: dict[str, object], settings: EngineSettings
) -> None:
    """Set what the engine room needs; raise BadInputError where the user asked otherwise."""
    from conserve.engine.launch import vllm_arguments
    from conserve.server import door

    needed: dict[str, Any] = dict(vllm_arguments(settings))
    ours = needed.pop("additional_config", {})
    if both := set(ours) & set(args.additional_config):
        raise BadInputError(
            f"--additional-config already holds {sorted(both)[0]!r}, which `conserve serve` fills "
            "from its own flags. Leave that key out."
        )
    args.additional_config = {**args.additional_config, **ours}
    for name, value in needed.items():
        wanted = door.kv_transfer_config(value) if name == "kv_transfer_config" else value
        given = getattr(args, name, None)
        if given is not None and given != wanted:
            raise BadInputError(
                f"--{name.replace('_', '-')} {given} contradicts ConServe, which needs {value}. "
                "Leave the flag out."
            )
        setattr(args, name, wanted)
    for name, default in withheld.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def tune_cpu(args: argparse.Namespace, available_memory_bytes: Any) -> str:
    """Thread binding, OpenMP and KV space, each unless the user chose; says what was chosen."""
    workers = args.tensor_parallel_size * args.pipeline_parallel_size
    workers *= args.data_parallel_size_local or args.data_parallel_size
    chosen = [cpu.bind_threads(os.environ, workers), cpu.preload_openmp(os.environ)]
    if args.kv_cache_memory_bytes is None and not os.environ.get(cpu.KV_SPACE):
        is_default = args.model_tag == str(default_model())
        args.kv_cache_memory_bytes = cpu.kv_cache_bytes(available_memory_bytes(), is_default)
        chosen.append(f"{args.kv_cache_memory_bytes / cpu.GIB:.1f} GiB for KV")
    return ", ".join(chosen)


def describe_targets(settings: EngineSettings) -> str:
    floor = f", offline work gets at least {settings.offline_floor:.0%}"
    return (
        f"first token {settings.slo_ttft_s * 1000:g} ms, "
        f"between tokens {settings.slo_tbt_s * 1000:g} ms"
        f"{floor if settings.offline_floor else ''}"
    )


def announce(vllm_version: str, lines: Sequence[tuple[str, str]]) -> None:
    """Say in a few lines on stderr what was chosen."""
    table = Table.grid(padding=(0, 2))
    for name, text in lines:
        table.add_row(f"  [bold]{name}[/]", text)
    console = Console(stderr=True)
    console.print(f"[bold]ConServe[/] on vLLM {vllm_version}")
    console.print(table)
