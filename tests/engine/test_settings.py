"""The engine's settings: bounds, types, names, and the way through vLLM's configuration."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as run_with
from hypothesis import strategies as st

from conserve.core.latency import LatencyModel
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import Targets
from conserve.engine.settings import CHECKPOINT_MODES, KEY, STOP_MODES, EngineSettings

calm = run_with(derandomize=True, deadline=None, database=None)
positive = st.floats(min_value=1e-6, max_value=1e6)
share = st.floats(min_value=0, max_value=1)
settings = st.builds(
    EngineSettings,
    slo_ttft_s=positive,
    slo_tbt_s=positive,
    offline_floor=st.floats(min_value=0, max_value=1, exclude_max=True),
    profile_dir=st.text(max_size=20),
    profile_seconds=st.floats(min_value=0, max_value=1e6),
    stop=st.sampled_from(STOP_MODES),
    stop_response_s=st.floats(min_value=0, max_value=10),
    checkpoint=st.sampled_from(CHECKPOINT_MODES),
    checkpoint_bytes=st.integers(0, 2**40),
    checkpoint_bytes_per_s=st.floats(min_value=0, max_value=1e12),
    checkpoint_verify=st.booleans(),
    rank_timeout_s=st.floats(min_value=0.1, max_value=100),
    policy=st.builds(
        PolicySettings,
        prefill_stretch=share,
        patience=share,
        max_stops=st.integers(0, 10),
        min_chunk=st.integers(1, 512),
        displacement=st.booleans(),
    ),
)


@calm
@given(settings)
def test_settings_survive_json(given: EngineSettings) -> None:
    """As `--additional-config` carries them."""
    text = json.dumps({KEY: given.to_json_dict()})
    assert EngineSettings.of(json.loads(text)) == given


@pytest.mark.parametrize("nothing", [None, {}, {"other": 1}, "text"])
def test_defaults_where_we_are_not_mentioned(nothing: object) -> None:
    assert EngineSettings.of(nothing) == EngineSettings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("slo_ttft_s", -1.0),
        ("slo_tbt_s", -0.1),
        ("offline_floor", 1.0),
        ("offline_floor", -0.1),
        ("profile_seconds", -1.0),
        ("stop_response_s", -0.001),
        ("rank_timeout_s", 0.0),
        ("stop", "maybe"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name.removeprefix("slo_")):
        EngineSettings(**{name: value})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"slo_tftt_s": 1}, "unknown setting 'slo_tftt_s'; known are checkpoint"),
        ({"policy": {"patienc": 1}}, "unknown policy setting 'patienc'; known are chat_slowdown"),
        ({"slo_ttft_s": "1"}, "slo_ttft_s must be of type float, not '1'"),
        ({"slo_ttft_s": True}, "slo_ttft_s must be of type float, not True"),
        ({"profile_seconds": float("nan")}, "profile_seconds must be of type float, not nan"),
        ({"profile_dir": None}, "profile_dir must be of type str, not None"),
        ({"policy": {"max_stops": 1.5}}, "max_stops must be of type int, not 1.5"),
        ({"policy": {"displacement": 1}}, "displacement must be of type bool, not 1"),
        ({"policy": None}, "policy settings must be a mapping"),
        ("fast", "settings must be a mapping"),
    ],
)
def test_bad_json_is_refused_by_name(values: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EngineSettings.of({KEY: values})


def test_whole_numbers_stand_for_seconds() -> None:
    assert EngineSettings.from_json_dict({"slo_ttft_s": 2}).targets.ttft_s == 2


def test_eager_is_no_patience_at_all() -> None:
    policy = PolicySettings(patience=0.5, max_stops=7)
    eager = EngineSettings(stop="eager", policy=policy).effective_policy
    assert eager == PolicySettings(patience=0.0, max_stops=7)
    for mode in ("auto", "off"):
        assert EngineSettings(stop=mode, policy=policy).effective_policy is policy


def test_targets_come_from_the_settings() -> None:
    targets = EngineSettings(slo_ttft_s=3.0, slo_tbt_s=0.5, offline_floor=0.1).targets
    assert (targets.ttft_s, targets.tbt_s, targets.offline_floor) == (3.0, 0.5, 0.1)


def test_targets_that_nobody_names_come_from_the_machine() -> None:
    slow = LatencyModel(0.05, 1e-3)
    named = EngineSettings(slo_ttft_s=3.0, offline_floor=0.1).targets_on(slow)
    assert named.targets == Targets(3.0, 0.3, 0.1)
    assert (named.ttft_reason, named.tbt_reason[:16]) == ("as asked for", "from the machine")
    assert EngineSettings().targets_on(slow).targets.ttft_s == 2.5
    assert EngineSettings().targets == Targets(), "unmeasured"


def test_nobody_changes_settings() -> None:
    one = EngineSettings()
    for field in fields(one):
        with pytest.raises(AttributeError):
            setattr(one, field.name, 1)
