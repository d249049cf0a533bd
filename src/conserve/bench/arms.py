"""The arms: each is one way to start a server and to send it the same two classes of requests.

To add one, add a row to `ARMS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from conserve.sim.arms import BOUND, ONLINE_ONLY, SLOWDOWNS, slowed
from conserve.workload import ScenarioError, unknown_name

FLEX: Mapping[str, Any] = {"service_tier": "flex"}
LATER: Mapping[str, Any] = {"priority": 1}

FORGETFUL = "conserve-forgetful"
"""What came before chat's memory was its own: what that costs offline work is told against it."""

FIXED_STEP_TOKENS = 256
"""About what two CPU cores compute of the default model in the default TBT target."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm of a benchmark.

    kind: `stock` starts vLLM's own server, `conserve` starts `conserve serve`.
    shows: one sentence on what comparing with it tells.
    online, offline: the classes of requests it is sent.
    offline_fields: what is added to the body of an offline request.
    args: what its server gets beside the arguments that every arm gets.
    settings: EngineSettings of `conserve serve` that differ from the default, as JSON.
    batch: whether the offline requests go as one batch instead of one by one.
    environment: what its server's environment has beside what every arm's has.
    on_curve: what it is called on the curve of harvest over chat's slowdown; empty: not on it.
    """

    name: str
    kind: Literal["stock", "conserve"]
    shows: str
    online: bool = True
    offline: bool = True
    offline_fields: Mapping[str, Any] = field(default_factory=dict)
    args: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    batch: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    on_curve: str = ""


def _ablation(name: str, shows: str, args: tuple[str, ...] = (), **settings: Any) -> Arm:
    return Arm(name, "conserve", shows, offline_fields=FLEX, args=args, settings=settings)


def _offline_only(name: str, shows: str, *args: str) -> Arm:
    return Arm(name, "conserve", shows, online=False, offline_fields=FLEX, args=args)


def _slowed(name: str, bound: str) -> Arm:
    """ConServe with another bound on how much slower than alone chat may get."""
    shows = f"ConServe with --chat-slowdown {bound}."
    args = ("--chat-slowdown", bound)
    return Arm(name, "conserve", shows, offline_fields=FLEX, args=args, on_curve=bound)


DEFAULT = "conserve"
RECOMPUTE = ("--checkpoint", "off")


ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(
            ONLINE_ONLY,
            "stock",
            "Stock vLLM with the online requests alone: the latency to come close to.",
            offline=False,
        ),
        Arm(
            BOUND,
            "stock",
            "Stock vLLM, everything first come first served: the offline throughput to come "
            "close to, called the bound.",
        ),
        Arm(
            "priority",
            "stock",
            "Stock vLLM with --scheduling-policy priority, online requests first.",
            offline_fields=LATER,
            args=("--scheduling-policy", "priority"),
        ),
        Arm(
            "offline-only",
            "stock",
            "Stock vLLM with the offline requests alone: what the machine can do.",
            online=False,
        ),
        Arm(DEFAULT, "conserve", "ConServe as it comes.", offline_fields=FLEX, on_curve="default"),
        *(_slowed(f"conserve-{level}", level) for level in ("gentle", "greedy")),
        *(_slowed(slowed(times), f"{times:g}") for times in SLOWDOWNS),
        Arm(
            "conserve-online-only",
            "conserve",
            "ConServe with the online requests alone: what its scheduler itself costs.",
            offline=False,
        ),
        _ablation(
            "conserve-fixed-budget",
            "ConServe with a fixed token budget a step instead of the latency targets.",
            policy={"fixed_step_tokens": FIXED_STEP_TOKENS},
        ),
        _ablation(
            "conserve-no-displacement",
            "ConServe where a waiting online request does not displace running offline ones.",
            policy={"displacement": False},
        ),
        _ablation(
            "conserve-no-stop",
            "ConServe where a step that has begun runs to its end.",
            stop="off",
        ),
        _ablation(
            "sarathi-p",
            "Fixed budget, preemption between steps only, recomputing what was displaced: the "
            "ConServe paper's baseline Sarathi-P, in our scheduler.",
            args=RECOMPUTE,
            policy={"fixed_step_tokens": FIXED_STEP_TOKENS},
            stop="off",
        ),
        _ablation(
            "conserve-recompute",
            "ConServe without KV checkpoints: what was displaced is computed again.",
            args=RECOMPUTE,
        ),
        _ablation(
            "conserve-swap",
            "ConServe where KV is copied to the host when a request is displaced, not before.",
            args=("--checkpoint", "swap"),
        ),
        _ablation(
            FORGETFUL,
            "ConServe where a sweep evicts conversations that pause: no memory is kept for chat.",
            args=("--no-checkpoint-online",),
            policy={"class_aware": False, "room_max_share": 0},
        ),
        _ablation(
            "conserve-no-retention",
            "ConServe where free blocks are handed out the least recently used first, whoever "
            "used them.",
            policy={"class_aware": False},
        ),
        _ablation(
            "conserve-no-room",
            "ConServe where offline work may hold every block that no chat runs in.",
            policy={"room_max_share": 0},
        ),
        _ablation(
            "conserve-no-online-copies",
            "ConServe where what chats have said is not copied to the host.",
            args=("--no-checkpoint-online",),
        ),
        _offline_only(
            "conserve-offline-only",
            "ConServe with the offline requests alone, KV checkpoints on.",
        ),
        _offline_only(
            "conserve-offline-only-recompute",
            "The same without KV checkpoints: the difference is what copying costs.",
            *RECOMPUTE,
        ),
        Arm(
            "conserve-batch",
            "conserve",
            "ConServe with the offline requests as one batch through /v1/batches.",
            batch=True,
        ),
        Arm(
            "conserve-batch-file-order",
            "conserve",
            "The same batch with its lines in the order of the file, not by shared beginnings.",
            batch=True,
            environment={"CONSERVE_BATCH_GROUP_PREFIXES": "false"},
        ),
    )
}


def arm_named(name: str) -> Arm:
    """The arm of that name. Raises ScenarioError with the nearest one."""
    try:
        return ARMS[name]
    except KeyError:
        raise ScenarioError(unknown_name("arm", name, list(ARMS))) from None


def known_arm(name: str) -> Arm:
    """The arm of that name, or one that says that the simulator alone has it: what it wrote is
    read here as well."""
    return ARMS.get(name) or Arm(name, "conserve", "An arm of the simulator alone.")
