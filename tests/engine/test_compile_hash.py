"""What is compiled for one engine serves the next, whatever its targets."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from conserve.engine.compile_hash import leave_out_settings
from conserve.engine.launch import vllm_arguments
from conserve.engine.settings import KEY, EngineSettings
from tests.engine.engine import TINY

pytestmark = pytest.mark.engine

Configure = Callable[..., Any]
LATE = EngineSettings(slo_ttft_s=9.0, stop="off", checkpoint="swap")


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    (tmp_path / "config.json").write_text(json.dumps(TINY))

    def make(settings: EngineSettings | None = None, **theirs: Any) -> Any:
        ours = vllm_arguments(settings) if settings else {}
        extra = {**ours.pop("additional_config", {}), **theirs}
        arguments = EngineArgs(
            model=str(tmp_path), skip_tokenizer_init=True, additional_config=extra, **ours
        )
        return arguments.create_engine_config()

    return make


@pytest.fixture(autouse=True)
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the plugin leaves it in every process, this one perhaps too, for the length of a test."""
    monkeypatch.setattr(VllmConfig, "compute_hash", inspect.unwrap(VllmConfig.compute_hash))
    leave_out_settings(VllmConfig)


def test_targets_and_arms_share_what_was_compiled(configure: Configure) -> None:
    assert configure(EngineSettings()).compute_hash() == configure(LATE).compute_hash()


def test_what_others_put_there_counts(configure: Configure) -> None:
    """A model may read its backend from it: another graph."""
    hashes = {
        configure(settings, **theirs).compute_hash()
        for settings in (EngineSettings(), LATE)
        for theirs in ({}, {"gdn_prefill_backend": "a"}, {"gdn_prefill_backend": "b"})
    }
    assert len(hashes) == 3


def test_hashing_leaves_the_settings_where_they_are(configure: Configure) -> None:
    config = configure(LATE, theirs=1)
    before = copy.deepcopy(config.additional_config)
    config.compute_hash()
    assert config.additional_config == before
    assert EngineSettings.of(config.additional_config) == LATE


def test_settings_reach_workers_and_come_from_the_command_line(
    configure: Configure, tmp_path: Path
) -> None:
    config = pickle.loads(pickle.dumps(configure(LATE)))
    assert EngineSettings.of(config.additional_config) == LATE
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    words = ["--model", str(tmp_path), "--additional-config"]
    words.append(json.dumps({KEY: LATE.to_json_dict()}))
    arguments = EngineArgs.from_cli_args(parser.parse_args(words))
    assert EngineSettings.of(arguments.additional_config) == LATE


def test_without_the_plugin_each_target_compiles_anew(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: vLLM hashes all that lies there."""
    monkeypatch.setattr(VllmConfig, "compute_hash", inspect.unwrap(VllmConfig.compute_hash))
    assert configure(EngineSettings()).compute_hash() != configure(LATE).compute_hash()
