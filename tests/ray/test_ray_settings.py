"""What a Serve config file may say, and what is refused by its name."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from conserve.ray import application, flags
from conserve.ray.autoscaling import PATH, OnlineLoad
from conserve.ray.replica import Replica
from conserve.ray.settings import DATABASE, SHARED, check_gpus, check_nodes, check_policy, read
from conserve.server.errors import BadInputError
from conserve.server.start import config_file
from conserve.server.start.batch_data import DATA_DIR

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "deploy" / "ray" / "serve.yaml"
ONE_STORE = dict.fromkeys(SHARED, "somewhere")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"modle": "x"}, "args.modle is no setting"),
        ({"num_replicas": 2}, "args.num_replicas is no setting: .* under deployments"),
        ({"model": 3}, "args.model: .*, not 3"),
        ({"flags": ["--port"]}, r"args.flags: .*, not \['--port'\]"),
        ({"flags": {"port": "many"}}, "flags.port: must be a port from 1 to 65535, not 'many'"),
        ({"flags": {"tensor_parallel_size": "two"}}, "tensor-parallel-size: must be a number"),
        ({"flags": {"shutdown-timeout": -1}}, "shutdown-timeout: must be a number, not -1"),
        ({"flags": {"uds": "/run/x"}}, "leave uds out: each replica has a port instead"),
        ({"flags": {"model": "x"}}, "leave model out: .* args.model"),
        ({"flags": {"slo_ttft_ms": -3}}, "--slo-ttft-ms: must be above 0 milliseconds"),
        ({"flags": {"checkpoint": "sometimes"}}, "--checkpoint: must be one of"),
    ],
)
def test_a_bad_value_is_named(args: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInputError, match=named):
        read(args, ONE_STORE)


def test_replicas_want_one_store() -> None:
    with pytest.raises(BadInputError, match=r"FILES_URL is not set. Set both in runtime_env"):
        read({}, {SHARED[0]: "postgresql+asyncpg://somewhere/db"})
    with pytest.raises(BadInputError, match=r"DATABASE_URL and CONSERVE_BATCH_FILES_URL are not"):
        read({"flags": {"no-batches": False}}, {})
    read({}, ONE_STORE)
    read({"flags": {"no_batches": True}}, {})
    read({"flags": {"data-dir": "/disk"}}, {})
    read({}, {DATA_DIR: "/disk"})


def node(*, is_alive: bool = True, num_gpus: float = 0.0, address: str = "") -> dict[str, Any]:
    """As Ray has it."""
    given = {"CPU": 8.0, "GPU": num_gpus, f"node:{address}": 1.0}
    return {"Alive": is_alive, "Resources": given}


HERE = {"CPU": 1.0, "node:10.0.0.5": 0.001}
"""What a replica gets that is held on one node."""


@pytest.mark.parametrize(
    ("replica", "nodes"),
    [
        ({"CPU": 1.0}, [node()]),
        ({"CPU": 1.0, "GPU": 1.0}, [node(), node(num_gpus=2.0)]),
        ({"CPU": 1.0}, [node(), node(is_alive=False)]),
        (HERE, [node(address="10.0.0.5"), node(address="10.0.0.6")]),
    ],
)
def test_one_node_may_keep_batches_in_sqlite(
    replica: dict[str, float], nodes: list[dict[str, Any]]
) -> None:
    settings = read({"flags": {"data-dir": "/disk"}}, {})
    check_nodes(settings, {}, replica, nodes)
    with pytest.raises(BadInputError, match="may run on 2 nodes"):
        check_nodes(settings, {}, {"CPU": 1.0}, [node(), node()])


@pytest.mark.parametrize("database", ["", "sqlite+aiosqlite:////disk/batches.db"])
def test_several_nodes_need_a_database(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica says so when it starts."""
    context: Any = SimpleNamespace(
        _deployment_config=SimpleNamespace(autoscaling_config=None),
        replica_tag="one",
        rank=SimpleNamespace(local_rank=0),
        get_assigned_resources=lambda: {"CPU": 1.0},
    )
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray, "get_gpu_ids", list)
    monkeypatch.setattr(ray, "nodes", lambda: [node(), node()])
    monkeypatch.setenv(DATABASE, database)
    with pytest.raises(BadInputError, match=f"SQLite, which serves one: set {DATABASE} in runtime"):
        Replica(read({"flags": {"data-dir": "/disk"}}, {}))
    Replica(read({"flags": {"no-batches": True}}, {}))
    monkeypatch.setenv(DATABASE, "postgresql+asyncpg://somewhere/db")
    Replica(read({"flags": {"data-dir": "/disk"}}, {}))


def test_fewer_gpus_than_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags, "version", lambda _: "0.32.0")
    settings = read({"flags": {"tensor_parallel_size": 2, "data-parallel-size": 2}}, ONE_STORE)
    assert application.options(settings)["ray_actor_options"]["num_gpus"] == 4
    with pytest.raises(BadInputError, match=r"over 4 GPUs, .* set ray_actor_options.num_gpus to 4"):
        check_gpus(settings, 1)
    check_gpus(settings, 4)
    monkeypatch.setattr(flags, "version", lambda _: "0.32.0+cpu")
    check_gpus(settings, 0)


def test_serves_own_rule_for_scaling_is_refused() -> None:
    check_policy(None)
    check_policy(AutoscalingConfig.model_validate({"policy": {"policy_function": PATH}}))
    with pytest.raises(BadInputError, match=f"add policy: {{policy_function: {PATH}}}"):
        check_policy(AutoscalingConfig(max_replicas=4))


def test_flags_reach_conserve_serve_as_they_are_meant(tmp_path: Path) -> None:
    """By the reader of `--config`, whose `checkpoint: off` is a word and no boolean."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--lora-modules", nargs="*")
    parser.add_argument("--middleware", action="append")
    given = {
        "checkpoint": False,
        "enforce-eager": True,
        "lora-modules": ["a=1", "b=2"],
        "compilation-config.mode": 3,
        "served-model-name": "no: yes",
        "port": 8100,
    }
    file = flags.write("a: model", given, tmp_path)
    words = config_file.expand(["--config", str(file)], parser._option_string_actions)
    assert words == [
        *("a: model", "--checkpoint", "off", "--enforce-eager", "--lora-modules", "a=1", "b=2"),
        *("--compilation-config.mode", "3", "--served-model-name", "no: yes"),
    ]


def test_the_config_file_here_is_one_that_serve_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    (one,) = config.applications
    assert one.import_path == f"{application.__name__}:{application.build.__name__}"
    for name, value in one.runtime_env["env_vars"].items():
        monkeypatch.setenv(name, value)
    built = application.build(one.args)._bound_deployment
    assert built.max_ongoing_requests == application.NO_LIMIT
    (overridden,) = one.deployments
    assert overridden.name == built.name
    scaling = AutoscalingConfig(**dict(overridden.autoscaling_config or {}))
    check_policy(scaling)
    policy = scaling.policy.get_policy()(**scaling.policy.policy_kwargs)
    assert type(policy).__name__ == OnlineLoad.__name__
