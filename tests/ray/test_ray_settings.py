"""What a Serve config file may say, and what is refused by its name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from conserve.ray import application, flags
from conserve.ray.autoscaling import PATH, OnlineLoad
from conserve.ray.settings import SHARED, check_gpus, check_policy, read
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
    read({"flags": {"data-dir": "/shared"}}, {})
    read({}, {DATA_DIR: "/shared"})


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
