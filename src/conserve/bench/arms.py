"""The arms: each is one way to start a server and to send it the same two classes of requests.

To add one, add a row to `ARMS`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from conserve.metrics import Targets
from conserve.workload import ScenarioError, unknown_name

FLEX: Mapping[str, Any] = {"service_tier": "flex"}
LATER: Mapping[str, Any] = {"priority": 1}

ONLINE_ONLY = "online-only"
BOUND = "fcfs"
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


def _ablation(name: str, shows: str, args: tuple[str, ...] = (), **settings: Any) -> Arm:
    return Arm(name, "conserve", shows, offline_fields=FLEX, args=args, settings=settings)


def _offline_only(name: str, shows: str, *args: str) -> Arm:
    return Arm(name, "conserve", shows, online=False, offline_fields=FLEX, args=args)


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
        Arm("conserve", "conserve", "ConServe as it comes.", offline_fields=FLEX),
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


def server_command(
    arm: Arm, model: str, port: int, args: Sequence[str], targets: Targets, data_dir: Path
) -> list[str]:
    """The command that starts the arm's server; `args` are those every arm gets, and `data_dir` is
    a fresh folder for its batches."""
    shared = ["--port", str(port), "--host", "127.0.0.1", *args, *arm.args]
    if arm.kind == "stock":
        module = "vllm.entrypoints.openai.api_server"
        return [sys.executable, "-m", module, "--model", model, *shared]
    # Batches that wait in the user's data folder must not run in a measurement.
    ours = ["--data-dir", str(data_dir)] if arm.batch else ["--no-batches"]
    ours += ["--slo-ttft-ms", f"{targets.ttft_s * 1000:g}"]
    ours += ["--slo-tbt-ms", f"{targets.tbt_s * 1000:g}"]
    if arm.settings:
        ours += ["--additional-config", json.dumps({"conserve": arm.settings})]
    start = "from conserve.cli.main import main; main()"
    return [sys.executable, "-c", start, "serve", model, *shared, *ours]
