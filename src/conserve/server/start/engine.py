"""The engine's settings, and vLLM's arguments that turn the engine room on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conserve.server.errors import BadInputError

if TYPE_CHECKING:
    from conserve.engine.settings import EngineSettings

OWNED = ("scheduler_cls", "scheduling_policy", "worker_cls", "kv_transfer_config")
"""vLLM's arguments that the engine room sets; a user's other value is refused."""


def take_settings(args: argparse.Namespace, copies: dict[str, Any]) -> EngineSettings:
    """The engine's settings: our flags, taken out of vLLM's arguments (`copies` are already), and
    the finer ones that `--additional-config` holds under our key. Raises BadInputError for one
    it does not know.
    """
    from conserve.engine.settings import KEY, EngineSettings

    by_flag = {
        "slo_ttft_s": (vars(args).pop("slo_ttft_ms") or 0.0) / 1000,
        "slo_tbt_s": (vars(args).pop("slo_tbt_ms") or 0.0) / 1000,
        "slo_min_share": vars(args).pop("slo_min_share"),
        "offline_floor": vars(args).pop("offline_floor"),
        "router_metrics": vars(args).pop("router_metrics"),
        "priority_order": vars(args).pop("priority_order"),
        "flex_wait_s": vars(args).pop("flex_wait_s") or 0.0,
        "flex_max_waiting": vars(args).pop("flex_max_waiting") or 0,
        "profile_dir": str(Path(vars(args).pop("profile_dir")).expanduser().absolute()),
        **copies,
    }
    if not isinstance(args.additional_config, dict):
        raise BadInputError("--additional-config must be a JSON object.")
    others = dict(args.additional_config).pop(KEY, {})
    if not isinstance(others, dict):
        raise BadInputError(f"--additional-config: {KEY!r} must hold an object of settings.")
    others = _with_slowdown(others, vars(args).pop("chat_slowdown"))
    if both := sorted(set(by_flag) & set(others)):
        raise BadInputError(
            f"--additional-config: {KEY}.{both[0]} has a flag of its own; "
            "see `conserve serve --help=ConServe`."
        )
    try:
        return EngineSettings.from_json_dict({**others, **by_flag})
    except (TypeError, ValueError) as error:
        raise BadInputError(f"--additional-config: {KEY}: {error}") from error


def _with_slowdown(others: dict[str, Any], slowdown: float | None) -> dict[str, Any]:
    """The one setting of the policy that has a flag. Raises BadInputError where both are given."""
    from conserve.engine.settings import KEY

    policy = others.get("policy", {})
    if slowdown is None or not isinstance(policy, dict):
        return others
    if "chat_slowdown" in policy:
        raise BadInputError(
            f"--additional-config: {KEY}.policy.chat_slowdown is what --chat-slowdown says: "
            "leave one of them out."
        )
    return {**others, "policy": {**policy, "chat_slowdown": slowdown}}


def apply_settings(
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


def describe_targets(settings: EngineSettings) -> str:
    floor = f", offline work gets at least {settings.offline_floor:.0%}"
    first, gaps = _named(settings.slo_ttft_s), _named(settings.slo_tbt_s)
    targets = f"first token {first}, between tokens {gaps}"
    if not settings.slo_ttft_s and not settings.slo_tbt_s:
        targets = f"{first}: the engine says them when it has measured its steps"
    slowdown = settings.policy.chat_slowdown
    alone = f", steps at most {slowdown:g} times as long as for chat alone" if slowdown else ""
    return f"{targets}{alone}{floor if settings.offline_floor else ''}"


def _named(target_s: float) -> str:
    return f"{target_s * 1000:g} ms" if target_s else "from the machine"
