"""The tiny model, made once, and a real engine on it in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.stops.tiny_llama import make_model

    return make_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.stops.tiny_llama import make_lora

    return make_lora(tmp_path_factory.mktemp("tiny-lora"))


@pytest.fixture(autouse=True)
def one_thread_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is too small for more; threads that wait for one another spin, on a busy machine
    for as long as the forward takes many times over."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@dataclass(frozen=True)
class Played:
    """What a real engine did. `stops`: rank -> the (step, layer) of each stop it made."""

    status: int
    output: str
    stops: dict[str, list[tuple[int, int]]]
    result: dict[str, Any] = field(default_factory=dict)

    def assert_same_answers(self) -> None:
        """Every request stopped at random says what it said when nobody could stop it."""
        whole, stopped = self.result["whole"], self.result["stopped"]
        for key, answer in stopped.items():
            kind = key.rpartition("/")[0]
            assert_same(answer, whole[f"{kind}/whole"], key)
        asked = {key.rpartition("/")[0] for key in whole}
        assert {key.rpartition("/")[0] for key in stopped if key.endswith("/stopped")} == asked

    def assert_all_blocks_came_back(self) -> None:
        assert len(set(self.result["free_blocks"])) == 1, self.result["free_blocks"]


def assert_same(answer: dict[str, Any], wanted: dict[str, Any], name: str) -> None:
    """The same tokens; logprobs of the same candidates, as equal as float32 sums in another
    order are."""
    assert answer["tokens"] == wanted["tokens"], name
    assert len(answer["tokens"]) > 3, name
    for what in ("logprobs", "prompt_logprobs"):
        assert len(answer[what]) == len(wanted[what]), (name, what)
        for one, other in zip(answer[what], wanted[what], strict=True):
            assert one == pytest.approx(other, abs=1e-3), (name, what)


Play = Callable[..., Played]


@pytest.fixture
def play(tmp_path: Path, tiny_model: Path) -> Play:
    """Run `real_engine.py` with a job's entries as arguments; see there."""

    def run(environment: dict[str, str] | None = None, limit_s: float = 240, **job: Any) -> Played:
        log, result, output = tmp_path / "stops", tmp_path / "result", tmp_path / "output"
        for old in (log, result):
            old.unlink(missing_ok=True)
        job = {"model": str(tiny_model), "log": str(log), "result": str(result), **job}
        variables = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        variables |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(environment or {})}
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.stops.real_engine", json.dumps(job)],
                cwd=ROOT,
                env={**os.environ, **variables},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                status = -1
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        stops: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for line in log.read_text().splitlines() if log.exists() else ():
            rank, step, layer = line.split()
            stops[rank].append((int(step), int(layer)))
        told = json.loads(result.read_text()) if result.exists() else {}
        return Played(status, output.read_text(errors="replace"), dict(stops), told)

    return run
