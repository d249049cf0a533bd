"""What a Serve config file says of an application of ours, under `args`. How many replicas there
are, and what each gets, is Serve's to read, under `deployments`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray.serve.config import AutoscalingConfig

from conserve.ray import flags
from conserve.ray.autoscaling import PATH
from conserve.server.errors import BadInputError
from conserve.server.start.batch_data import DATA_DIR, PREFIX

DATABASE, FILES = SHARED = (f"{PREFIX}DATABASE_URL", f"{PREFIX}FILES_URL")
"""Environment that makes one store of all replicas."""


class RaySettings(BaseModel):
    """Frozen and complete; one replica is one `conserve serve` on one node."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = Field(
        default=None,
        description="Name on the hub, or a folder that every node has; the small default model.",
    )
    flags: dict[str, Any] = Field(
        default_factory=dict,
        description="Any flags of `conserve serve`, as in the file of its `--config`.",
    )


def read(values: Mapping[str, Any], environ: Mapping[str, str]) -> RaySettings:
    """The settings, with the names of flags as the documentation has them.

    Raises BadInputError, which names the value and what to do about it.
    """
    try:
        settings = RaySettings.model_validate(values)
    except ValidationError as error:
        raise BadInputError(_explained(error)) from error
    settings = settings.model_copy(update={"flags": flags.with_dashes(settings.flags)})
    flags.check(settings.flags)
    _check_store(settings.flags, environ)
    return settings


def _explained(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in ("args", *first["loc"]))
    if first["type"] == "extra_forbidden":
        return (
            f"{where} is no setting: args has model and flags, where all flags of `conserve serve` "
            "go. Replicas, GPUs and autoscaling are set under deployments."
        )
    return f"{where}: {first['msg']}, not {first['input']!r}."


def _check_store(given: flags.Flags, environ: Mapping[str, str]) -> None:
    if given.get("no-batches") is True or "data-dir" in given or DATA_DIR in environ:
        return
    if missing := [name for name in SHARED if not environ.get(name)]:
        is_or_are = "are" if len(missing) > 1 else "is"
        raise BadInputError(
            f"Replicas need one store for batches, and {' and '.join(missing)} {is_or_are} not "
            "set. Set both in runtime_env.env_vars, or args.flags.data-dir to a folder where all "
            "replicas run on one node, or args.flags.no-batches to true."
        )


def check_nodes(
    settings: RaySettings,
    environ: Mapping[str, str],
    replica: Mapping[str, float],
    nodes: Sequence[Mapping[str, Any]],
) -> None:
    """Raises BadInputError where replicas may run on several nodes, and batches are kept in SQLite:
    its journal is in one machine's memory, and two that write on a disk of a network lose data.

    replica: resources that Ray gives each; nodes: as `ray.nodes` has them, of which those that are
    alive and have as much may be a replica's.
    """
    database = environ.get(DATABASE) or "sqlite"
    if settings.flags.get("no-batches") is True or not database.startswith("sqlite"):
        return
    have = [node["Resources"] for node in nodes if node["Alive"]]
    fit = [one for one in have if all(one.get(name, 0) >= replica[name] for name in replica)]
    if len(fit) > 1:
        raise BadInputError(
            f"Replicas may run on {len(fit)} nodes, and batches are kept in SQLite, which serves "
            f"one: set {DATABASE} in runtime_env.env_vars to a PostgreSQL, or hold the replicas "
            "on one node by ray_actor_options.resources, as in {node:10.0.0.5: 0.001}."
        )


def check_gpus(settings: RaySettings, num_given: int) -> None:
    """Raises BadInputError where Ray gives a replica fewer than its server uses."""
    wanted = flags.num_gpus(settings.flags)
    if num_given < wanted:
        raise BadInputError(
            f"The flags split the model over {wanted} GPUs, and Ray gives a replica {num_given}: "
            f"set ray_actor_options.num_gpus to {wanted}, or lower {', '.join(flags.SIZES)}."
        )


def check_policy(scaling: AutoscalingConfig | None) -> None:
    """Raises BadInputError where Serve's own rule would scale: it takes offline requests, which
    wait for hours by right, for load."""
    if scaling is not None and scaling.policy.is_default_policy_function():
        raise BadInputError(
            "autoscaling_config has no policy, and Serve's own counts offline requests as load: "
            f"add policy: {{policy_function: {PATH}}}, or set num_replicas instead."
        )
