"""`conserve serve`: vLLM's OpenAI server in this process, with our scheduler and classes."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from conserve.server.errors import BadInputError
from conserve.server.start import checkpoints, cpu, dtype, flags
from conserve.server.start.default_model import NAME, default_model

if TYPE_CHECKING:
    from conserve.engine.settings import EngineSettings

DASHBOARD = "conserve.server.dashboard.middleware.DashboardMiddleware"
TIERS = "conserve.server.tiers.ServiceTierMiddleware"
LOGS = "conserve.server.logs.middleware.LogsMiddleware"
BATCHES = "conserve.server.batches.middleware.BatchesMiddleware"

OWNED = ("scheduler_cls", "scheduling_policy", "worker_cls", "kv_transfer_config")
"""vLLM's arguments that the engine room sets; a user's other value is refused."""

CHOSEN = ("enforce_eager", "enable_prompt_tokens_details")
"""vLLM's arguments whose default we choose; a user's value stands."""


def serve(arguments: Sequence[str]) -> None:
    """Parse `[MODEL] [flags]`, prepare, and serve until a signal ends it.

    Raises BadInputError before any model is loaded.
    """
    flags.check_early(arguments)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from conserve.engine.host_memory import available_bytes
    from conserve.server import door  # brings vLLM, which takes seconds to import

    parsed = door.parse(arguments, flags.add_to, OWNED + CHOSEN)
    args = parsed.args
    check_port(args)
    as_json = vars(args).pop("log_json")
    if as_json:
        door.log_json(args)
    copies = checkpoints.take_flags(args, available_bytes)
    settings = take_settings(args, copies)
    lines = [("model", choose_model(args))]
    lines.append(("targets", describe_targets(settings)))
    lines.append(("batches", choose_batches(args)))
    lines.append(("KV copies", checkpoints.describe(copies, available_bytes)))
    lines.append(("page", choose_dashboard(args)))
    if door.on_cpu():
        lines.append(("cpu", tune_cpu(args, available_bytes)))
    apply_engine(args, parsed.withheld, settings)
    args.middleware = [LOGS, TIERS, *args.middleware]
    announce(door.version(), lines, as_json=as_json)
    door.run(args)


def choose_model(args: argparse.Namespace) -> str:
    """Settle which model is served, the default one included; says which and where it is."""
    from conserve.server import door
    from conserve.server.start import hub

    if args.model_tag is None and args.model == door.DEFAULT_MODEL:
        folder = default_model()
        args.model_tag = str(folder)
        args.served_model_name = args.served_model_name or [NAME]
        if args.enforce_eager is None and door.on_cpu():
            # Compiling this model makes it 1.1 to 1.3 times as fast and every start 40 s longer.
            args.enforce_eager = True
    else:
        args.model_tag = args.model_tag or args.model
        hub.check_model(args.model_tag, args.revision)
    if hub.is_local(args.model_tag) and "HF_HUB_OFFLINE" not in os.environ:
        os.environ["HF_HUB_OFFLINE"] = "1"
        door.stay_offline()
    names = args.served_model_name
    return f"{names[0]} ({args.model_tag})" if names else str(args.model_tag)


def choose_batches(args: argparse.Namespace) -> str:
    """Settle whether files and batches are served, and where they lie; says so.

    Every API process reads the place from the environment. Raises BadInputError.
    """
    from conserve.server.start.batch_data import DATA_DIR, settle_data_dir

    flag, off = vars(args).pop("data_dir"), vars(args).pop("no_batches")
    if off or args.headless:
        return "off"
    names = args.served_model_name or [args.model_tag]
    folder = settle_data_dir(flag, names[0])
    os.environ[DATA_DIR] = str(folder)
    if args.enable_prompt_tokens_details is None:
        # Or no answer would say what the prefix cache saved, and no batch's usage.
        args.enable_prompt_tokens_details = True
    args.middleware = [BATCHES, *args.middleware]
    return f"in {folder}"


def choose_dashboard(args: argparse.Namespace) -> str:
    """Settle whether the live page is served; says where. To be called after `choose_batches`:
    the page shows the batches of a service that is there when it starts."""
    if vars(args).pop("no_dashboard") or args.headless:
        return "off"
    args.middleware = [DASHBOARD, *args.middleware]
    if args.uds:
        return "/dashboard"
    scheme = "https" if args.ssl_certfile else "http"
    host = args.host if args.host not in (None, "", "0.0.0.0", "::") else "localhost"  # noqa: S104
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}:{args.port}{args.root_path or ''}/dashboard"


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


def take_settings(args: argparse.Namespace, copies: dict[str, Any]) -> EngineSettings:
    """The engine's settings: our flags, taken out of vLLM's arguments (`copies` are already), and
    the finer ones that `--additional-config` holds under our key. Raises BadInputError for one
    it does not know.
    """
    from conserve.engine.settings import KEY, EngineSettings

    by_flag = {
        "slo_ttft_s": vars(args).pop("slo_ttft_ms") / 1000,
        "slo_tbt_s": vars(args).pop("slo_tbt_ms") / 1000,
        "offline_floor": vars(args).pop("offline_floor"),
        "profile_dir": str(Path(vars(args).pop("profile_dir")).expanduser().absolute()),
        **copies,
    }
    others = dict(args.additional_config).pop(KEY, {})
    if not isinstance(others, dict):
        raise BadInputError(f"--additional-config: {KEY!r} must hold an object of settings.")
    if both := sorted(set(by_flag) & set(others)):
        raise BadInputError(
            f"--additional-config: {KEY}.{both[0]} has a flag of its own; "
            "see `conserve serve --help=ConServe`."
        )
    try:
        return EngineSettings.from_json_dict({**others, **by_flag})
    except (TypeError, ValueError) as error:
        raise BadInputError(f"--additional-config: {KEY}: {error}") from error


def apply_engine(
    args: argparse.Namespace, withheld: dict[str, object], settings: EngineSettings
) -> None:
    """Set what the engine room needs; raise BadInputError where the user asked otherwise."""
    from conserve.engine.launch import vllm_arguments
    from conserve.server import door

    theirs = door.kv_transfer_dict(args.kv_transfer_config)
    needed: dict[str, Any] = dict(vllm_arguments(settings, theirs))
    args.kv_transfer_config = door.kv_transfer_config(needed.pop("kv_transfer_config"))
    args.additional_config = {**args.additional_config, **needed.pop("additional_config", {})}
    for name, value in needed.items():
        given = getattr(args, name)
        if given is not None and given != value:
            raise BadInputError(
                f"--{name.replace('_', '-')} {given} contradicts ConServe, which needs {value}. "
                "Leave the flag out."
            )
        setattr(args, name, value)
    for name, default in withheld.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def tune_cpu(args: argparse.Namespace, available_bytes: Callable[[], int]) -> str:
    """Data type, thread binding, OpenMP and KV space, each unless the user chose; says what was
    chosen. Raises BadInputError for a model that is too large in the data type it needs here."""
    workers = args.tensor_parallel_size * args.pipeline_parallel_size
    workers *= args.data_parallel_size_local or args.data_parallel_size
    facts = dtype.facts_of(args)
    choice = dtype.choose(args.dtype, facts, multiplies=dtype.multiplies_bfloat16_here())
    args.dtype = choice.dtype
    chosen = [choice.words, cpu.bind_threads(os.environ, workers), cpu.preload_openmp(os.environ)]
    free_bytes = available_bytes()
    if args.kv_cache_memory_bytes is None and not os.environ.get(cpu.KV_SPACE):
        is_default = args.model_tag == str(default_model())
        num_bytes = choice.num_bytes if args.kv_cache_dtype == "auto" else 2
        args.kv_cache_memory_bytes = cpu.kv_cache_bytes(free_bytes, is_default, num_bytes)
        chosen.append(f"{args.kv_cache_memory_bytes / cpu.GIB:.1f} GiB for KV")
    dtype.check_fits(facts, choice, free_bytes - cpu.kv_space_bytes(args, os.environ))
    return ", ".join(chosen)


def describe_targets(settings: EngineSettings) -> str:
    floor = f", offline work gets at least {settings.offline_floor:.0%}"
    return (
        f"first token {settings.slo_ttft_s * 1000:g} ms, "
        f"between tokens {settings.slo_tbt_s * 1000:g} ms"
        f"{floor if settings.offline_floor else ''}"
    )


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
