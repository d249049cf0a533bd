"""Latency profiles on disk: what is written is read, and anything else is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.core.latency import LatencyModel, StepShape
from conserve.engine import profile_store
from conserve.engine.profile_store import Profile, UnreadableProfileError

pytestmark = pytest.mark.engine

PROFILE = Profile(
    LatencyModel(0.01, 1e-3, 1e-7, 2e-4, 3e-8, knee=64.0, margin=0.08),
    0.04,
    [(StepShape(10, 50.0, 0, 0), 0.02), (StepShape(3, 0.0, 3, 99), 0.013)],
)


def config(**changes: Any) -> Any:
    """The part of vLLM's configuration that names a profile."""
    values = {
        "model": "some/model",
        "runner_type": "generate",
        "dtype": "torch.float32",
        "quantization": None,
        "enforce_eager": True,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "enable_expert_parallel": False,
        "prefill_context_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "async_scheduling": False,
        "use_v2_model_runner": False,
    } | changes
    part = SimpleNamespace(**values)
    return SimpleNamespace(
        model_config=part,
        parallel_config=part,
        scheduler_config=part,
        use_v2_model_runner=part.use_v2_model_runner,
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return profile_store.path_of(str(tmp_path / "profiles"), config())


def test_what_is_saved_is_loaded(path: Path) -> None:
    assert profile_store.load(path) is None
    profile_store.save(path, config(), PROFILE)
    assert profile_store.load(path) == PROFILE
    profile_store.save(path, config(), PROFILE)
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing half-made is left"


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other/model"},
        {"dtype": "torch.bfloat16"},
        {"runner_type": "pooling"},
        {"quantization": "awq"},
        {"enforce_eager": False},
        {"tensor_parallel_size": 2},
        {"data_parallel_size": 2},
        {"enable_expert_parallel": True},
        {"decode_context_parallel_size": 2},
        {"async_scheduling": True},
        {"use_v2_model_runner": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_step_times_depend_on_has_its_own_file(path: Path, change: dict[str, Any]) -> None:
    folder = str(path.parent)
    assert profile_store.path_of(folder, config()) == path
    assert profile_store.path_of(folder, config(**change)) != path


def test_the_machines_settings_have_their_own_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "17-18")
    assert profile_store.path_of(str(path.parent), config()) != path


def damaged(path: Path, change: dict[str, Any]) -> None:
    profile_store.save(path, config(), PROFILE)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe\x00profile", b'{"identity": {"format": 1}}'],
)
def test_a_file_that_is_no_profile_is_unreadable(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(UnreadableProfileError, match=path.name):
        profile_store.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"identity": {"format": 0}},
        {"coefficients": [1, 2, 3]},
        {"coefficients": "abcdef"},
        {"coefficients": [0.1, 1e-3, -1e-7, 0, 0, 0]},
        {"coefficients": [0.1, 1e-3, float("nan"), 0, 0, 0]},
        {"knee": None},
        {"margin": float("inf")},
        {"mean_error": "small"},
        {"samples": [[1, 2, 3]]},
        {"samples": 7},
    ],
    ids=str,
)
def test_a_profile_with_a_wrong_value_is_unreadable(path: Path, change: dict[str, Any]) -> None:
    damaged(path, change)
    with pytest.raises(UnreadableProfileError, match=path.name):
        profile_store.load(path)


def test_a_profile_of_another_format_says_so(path: Path) -> None:
    damaged(path, {"identity": {"format": profile_store.FORMAT + 1}})
    with pytest.raises(UnreadableProfileError, match="of another format"):
        profile_store.load(path)


def test_a_folder_in_the_place_of_the_file_is_unreadable(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(UnreadableProfileError, match=path.name):
        profile_store.load(path)


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        profile_store.save(tmp_path / "file" / "p.json", config(), PROFILE)


def test_a_failed_save_leaves_the_old_profile_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile_store.save(path, config(), PROFILE)

    def full(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        profile_store.save(path, config(), Profile(PROFILE.model, 0.5, []))
    monkeypatch.undo()
    assert profile_store.load(path) == PROFILE
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_reader_never_sees_half_a_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name appears at once with the whole content, because the content was there before."""
    seen = []
    replace = os.replace

    def watched(source: str, target: Path) -> None:
        seen.append((Path(target).exists(), profile_store.load(Path(source))))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    profile_store.save(path, config(), PROFILE)
    assert seen == [(False, PROFILE)]
