"""The start-up profile on the real scheduler and a device whose step times are known."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.core.latency import LatencyModel, StepShape
from conserve.core.policy import decide
from conserve.core.snapshot import Targets
from conserve.engine import calibrate as module
from conserve.engine import profile_bench
from conserve.engine.calibrate import calibrate
from conserve.engine.profile_script import Reach
from conserve.engine.settings import EngineSettings
from conserve.engine.steps import GENERIC_MODEL
from conserve.metrics.machine_targets import choose_targets
from conserve.metrics.processors import NOTHING, Taken
from tests.engine.device import Device
from tests.engine.engine import BLOCK_SIZE, Engine, make_request, make_scheduler

pytestmark = pytest.mark.engine

TRUTH = LatencyModel(0.012, 3e-4, 2e-7, 4e-4, 5e-7, knee=64.0)
SHAPES = [
    StepShape(16, 128.0),
    StepShape(256, 256 * 128.0),
    StepShape(256, 256 * 900.0),
    StepShape(8, 0.0, 8, 8 * 150),
    StepShape(72, 64 * 32.0, 8, 8 * 150),
]


@dataclass
class TimedEngine(Engine):
    """Each step takes the time that `truth` gives what was really scheduled."""

    truth: LatencyModel = TRUTH
    num_steps: int = 0
    fails: Callable[[int], bool] = lambda number: False
    """Whether the step of this number fails in the workers."""
    stretch: Callable[[int], float] = lambda number: 1.0
    """How many times as long as by `truth` it takes."""

    def seconds(self, record: Any) -> float:
        self.num_steps += 1
        if self.fails(self.num_steps):
            raise RuntimeError("the kernel wants larger heads")
        return self.truth.predict_s(record.shape) * self.stretch(self.num_steps)


@dataclass
class Core:
    """The part of vLLM's EngineCore that a profile drives."""

    engine: TimedEngine
    scheduler: Any = field(init=False)
    request_block_hasher: Any = field(init=False)

    def __post_init__(self) -> None:
        hasher = make_request("x", [1], 1, online=True, arrival_s=0.0)._block_hasher
        self.scheduler, self.request_block_hasher = self.engine.scheduler, hasher

    @property
    def batch_queue(self) -> Any:
        """The steps in flight; the loop without a queue has none to show."""
        return self.engine._queue if self.engine.depth > 1 else None

    def add_request(self, request: Any) -> None:
        self.engine.add(request)

    def step_fn(self) -> None:
        self.engine.step_fn()


@dataclass
class Log:
    """Stands in for the module's logger."""

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def info(self, text: str, *values: Any) -> None:
        self.lines.append(text % values)

    def warning(self, text: str, *values: Any) -> None:
        self.warnings.append(text % values)

    def exception(self, text: str) -> None:
        self.errors.append(f"{text}: {sys.exception()!r}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    monkeypatch.setattr(module, "logger", log)
    return log


MakeCore = Callable[..., Core]


@pytest.fixture
def make_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeCore]:
    made: list[Any] = []
    monkeypatch.setattr(module, "taken", lambda *_: NOTHING)

    def make(
        depth: int = 1,
        *,
        truth: LatencyModel = TRUTH,
        max_num_seqs: int = 16,
        max_step_tokens: int = 256,
        max_model_len: int = 2048,
        num_blocks: int = 4096,
        **settings: Any,
    ) -> Core:
        scheduler = make_scheduler(
            tmp_path,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_step_tokens=max_step_tokens,
            max_model_len=max_model_len,
            async_scheduling=depth > 1,
            settings=EngineSettings(**settings),
        )
        made.append(scheduler)
        clock = scheduler.clock
        clocks = SimpleNamespace(perf_counter=clock, monotonic=clock)
        monkeypatch.setattr(module, "time", clocks)
        monkeypatch.setattr(profile_bench, "time", clocks)
        engine = TimedEngine(scheduler, Device(BLOCK_SIZE), depth=depth, truth=truth, step_s=0.0)
        return Core(engine)

    yield make
    for scheduler in made:
        scheduler.shutdown()


def assert_recovers(model: LatencyModel, shapes: list[StepShape]) -> None:
    for shape in shapes:
        assert model.predict_s(shape) == pytest.approx(TRUTH.predict_s(shape), rel=0.03), shape


def stored(folder: Path) -> Any:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
def test_the_fitted_model_is_the_device(make_core: MakeCore, log: Log, depth: int) -> None:
    core = make_core(depth)
    calibrate(core)
    assert_recovers(core.scheduler.experience.model, SHAPES)
    assert core.scheduler.experience.recalibrator.mean_error < 0.01
    assert not log.warnings
    assert "mean error (measured in " in log.lines[0]
    assert "KV space for 16384 tokens" in log.lines[1]


def test_the_check_above_tells_models_apart() -> None:
    """The negative control."""
    with pytest.raises(AssertionError):
        assert_recovers(GENERIC_MODEL, SHAPES)


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
def test_the_profile_ends_in_time(make_core: MakeCore, log: Log, depth: int) -> None:
    core = make_core(depth, profile_seconds=2.0)
    started_s = core.scheduler.clock()
    calibrate(core)
    longest_step_s = 0.2
    assert 1.0 < core.scheduler.clock() - started_s < 2.0 + longest_step_s
    assert_recovers(core.scheduler.experience.model, SHAPES[:1])


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
def test_nothing_is_left_behind(make_core: MakeCore, log: Log, depth: int) -> None:
    core = make_core(depth)
    scheduler = core.scheduler
    calibrate(core)
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one is the null block
    assert len(pool.cached_block_hash_to_block) == 0
    assert not scheduler.requests
    assert not scheduler.running
    assert len(scheduler.waiting) == 0
    assert not scheduler.has_requests()
    assert not scheduler.driver.steps
    assert scheduler.driver.planner is decide
    assert scheduler.stats.is_empty()
    assert not scheduler.tracker._views
    assert scheduler.experience.traffic.offline_share == 0
    stats = scheduler.make_stats()
    assert stats.prefix_cache_stats.requests == 0
    core.engine.outputs.clear()
    core.engine.finished.clear()
    core.engine.add(make_request("first", [1, 2, 3], 2, online=True, arrival_s=0.0))
    core.engine.run()
    assert core.engine.finished == {"first"}


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize(
    "limits",
    [
        {"max_num_seqs": 1},
        {"max_num_seqs": 2},
        {"max_num_seqs": 4},
        {"max_model_len": 512},
        {"max_model_len": 64, "num_blocks": 64},
        {"max_step_tokens": 48},
        {"num_blocks": 520},
    ],
    ids=str,
)
def test_every_sample_is_a_step_that_ran(
    make_core: MakeCore, log: Log, tmp_path: Path, limits: dict[str, int], depth: int
) -> None:
    """Also where slots, blocks, tokens or positions are few: what could not run is no sample."""
    core = make_core(depth, profile_dir=str(tmp_path / "profiles"), **limits)
    calibrate(core)
    samples = stored(tmp_path / "profiles")["samples"]
    assert len(samples) >= 20
    for *shape, seconds in samples:
        assert seconds == pytest.approx(TRUTH.predict_s(StepShape(*shape)), rel=1e-6), shape
    assert_recovers(core.scheduler.experience.model, SHAPES[:1])
    assert not core.scheduler.requests


def test_replicas_whose_forwards_are_collective_take_no_step_of_their_own(
    make_core: MakeCore, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With experts spread over data-parallel replicas; of a dense model each is on its own."""
    config_class = type(make_core().scheduler.vllm_config.model_config)
    for is_moe, runs in ((True, False), (False, True)):
        monkeypatch.setattr(config_class, "is_moe", is_moe)
        core = make_core()
        core.scheduler.vllm_config.parallel_config.data_parallel_size = 2
        calibrate(core)
        assert (core.engine.num_steps > 0) is runs
        assert any("would wait for the other replicas" in line for line in log.lines) is not runs
        assert not core.scheduler.requests
        log.lines.clear()


def test_a_kept_profile_needs_no_step(make_core: MakeCore, log: Log, tmp_path: Path) -> None:
    folder = tmp_path / "profiles"
    calibrate(make_core(profile_dir=str(folder)))
    assert ", kept in " in log.lines[0]
    core = make_core(profile_dir=str(folder), truth=LatencyModel(9.0, 9.0))
    calibrate(core)
    assert core.engine.num_steps == 0
    assert_recovers(core.scheduler.experience.model, SHAPES)
    (second,) = [line for line in log.lines if f"(from {folder}" in line]
    assert "latency model" in second
    assert not log.warnings


def test_targets_come_from_the_profile_and_stay(make_core: MakeCore, log: Log) -> None:
    core = make_core()
    calibrate(core)
    scheduler = core.scheduler
    chosen = choose_targets(scheduler.experience.model)
    assert scheduler.promises.chosen == chosen
    assert chosen.targets != Targets()
    told = [line for line in log.lines if "target" in line]
    assert told == [
        f"ConServe: TTFT target {1000 * chosen.targets.ttft_s:g} ms, {chosen.ttft_reason}",
        f"ConServe: TBT target {1000 * chosen.targets.tbt_s:g} ms, {chosen.tbt_reason}",
    ]
    assert scheduler.snapshots.take(0.0, can_stop=False).targets == chosen.targets
    for _ in range(200):
        scheduler.experience.recalibrator.observe(StepShape(64, 2048.0), 1.0)
    assert scheduler.promises.targets == chosen.targets


def test_a_named_target_is_kept(make_core: MakeCore, log: Log) -> None:
    core = make_core(slo_tbt_s=0.31)
    calibrate(core)
    assert core.scheduler.promises.targets.tbt_s == 0.31
    assert "ConServe: TBT target 310 ms, as asked for" in log.lines


def test_without_a_profile_the_defaults_are_said(make_core: MakeCore, log: Log) -> None:
    core = make_core(profile_seconds=0)
    calibrate(core)
    assert core.scheduler.promises.targets == Targets()
    told = [line for line in log.lines if "by default: the machine has not been measured" in line]
    assert len(told) == 2


@pytest.mark.parametrize("content", [b"{", b"\xff\x00", b'{"identity": {"format": 0}}'])
def test_a_damaged_profile_is_rebuilt_and_said_so(
    make_core: MakeCore, log: Log, tmp_path: Path, content: bytes
) -> None:
    folder = tmp_path / "profiles"
    calibrate(make_core(profile_dir=str(folder)))
    (path,) = folder.glob("*.json")
    path.write_bytes(content)
    core = make_core(profile_dir=str(folder))
    calibrate(core)
    assert core.engine.num_steps > 0
    (warning,) = log.warnings
    assert "latency profile is rebuilt" in warning
    assert str(path) in warning
    assert_recovers(core.scheduler.experience.model, SHAPES)
    assert len(stored(folder)["coefficients"]) == 6, "the file is good again"


def test_a_folder_that_cannot_be_written_costs_only_the_file(
    make_core: MakeCore, log: Log, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    core = make_core(profile_dir=str(tmp_path / "file" / "profiles"))
    calibrate(core)
    assert any("profile is not kept" in line for line in log.warnings)
    assert_recovers(core.scheduler.experience.model, SHAPES)


@pytest.mark.parametrize("why", ["switched off", "an encoder alone"])
def test_without_a_profile_a_generic_model_serves(make_core: MakeCore, log: Log, why: str) -> None:
    core = make_core(profile_seconds=0.0 if why == "switched off" else 15.0)
    if why == "an encoder alone":
        core.scheduler.vllm_config = SimpleNamespace(
            **{**vars(core.scheduler.vllm_config), "is_mm_encoder_only": True}
        )
    calibrate(core)
    assert log.warnings[-1].endswith("starting from a generic one")
    assert core.scheduler.driver.planner is decide
    assert not core.scheduler.requests
    core.engine.outputs.clear()
    core.engine.add(make_request("first", [1, 2, 3], 2, online=True, arrival_s=0.0))
    core.engine.run()


SLOW = LatencyModel(0.25, 1.2e-2, 2e-7, 2e-2, 5e-7)
"""84 prompt tokens and 36 tokens in 16 streams a second: bfloat16 without its instructions."""


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("seconds", [15.0, 0.001])
def test_a_slow_machine_gets_a_model_of_its_own(
    make_core: MakeCore, log: Log, seconds: float, depth: int
) -> None:
    """Fewer and shorter steps, in a time that stays bounded, and a model that holds for what
    traffic brings."""
    core = make_core(depth, truth=SLOW, profile_seconds=seconds)
    started_s = core.scheduler.clock()
    calibrate(core)
    assert core.scheduler.clock() - started_s < seconds + 2 * profile_bench.LEAST_SAMPLES
    model = core.scheduler.experience.model
    for shape in (StepShape(64, 64 * 32.0), StepShape(8, 0.0, 8, 8 * 64)):
        assert model.predict_s(shape) == pytest.approx(SLOW.predict_s(shape), rel=0.15)
    assert not log.warnings or "target" in log.warnings[0]


def test_the_whole_script_would_teach_a_slow_machine_nothing_of_decodes(
    make_core: MakeCore, log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: what the reach is cut for."""

    def num_decode_steps(folder: Path) -> int:
        calibrate(make_core(truth=SLOW, profile_dir=str(folder)))
        return sum(decodes > 0 for _, _, decodes, _, _ in stored(folder)["samples"])

    assert num_decode_steps(tmp_path / "cut") >= 5
    monkeypatch.setattr(Reach, "within", lambda self, per_token_s, seconds: self)
    assert num_decode_steps(tmp_path / "whole") == 0


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("first", [1, 7, 30])
def test_a_step_that_fails_ends_nothing_and_names_its_cause(
    make_core: MakeCore, log: Log, first: int, depth: int
) -> None:
    core = make_core(depth)
    core.engine.fails = lambda number: number == first
    calibrate(core)
    (error,) = log.errors
    assert "the kernel wants larger heads" in error
    scheduler = core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert len(pool.cached_block_hash_to_block) == 0
    assert scheduler.processed_step_seq == scheduler.sched_step_seq
    assert (scheduler.experience.model == GENERIC_MODEL) == (first < 7)
    assert not scheduler.requests
    assert not scheduler.driver.steps
    assert scheduler.driver.planner is decide
    core.engine.outputs.clear()
    core.engine.add(make_request("first", [1, 2, 3], 2, online=True, arrival_s=0.0))
    core.engine.run()
    assert core.engine.finished == {"first"}


def test_an_engine_that_fails_for_good_is_left_to_its_first_request(
    make_core: MakeCore, log: Log
) -> None:
    core = make_core()
    core.engine.fails = lambda number: True
    calibrate(core)
    assert any("larger heads" in error for error in log.errors)
    assert not core.scheduler.requests
    core.engine.add(make_request("first", [1, 2, 3], 2, online=True, arrival_s=0.0))
    with pytest.raises(RuntimeError, match="larger heads"):
        core.engine.run()


def test_few_samples_give_a_rough_model_and_not_a_guess(
    make_core: MakeCore, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_bench, "LEAST_SAMPLES", 3)
    core = make_core(truth=SLOW, profile_seconds=0.001)
    calibrate(core)
    assert "a rough one: 3 samples" in log.warnings[0]
    model = core.scheduler.experience.model
    assert model.predict_prefill_s(64) == pytest.approx(SLOW.predict_prefill_s(64), rel=0.5)


def test_a_disturbed_profile_serves_and_is_not_kept(
    make_core: MakeCore, log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "taken", lambda *_: Taken(others=0.4))
    folder = tmp_path / "profiles"
    core = make_core(profile_dir=str(folder))
    calibrate(core)
    assert "others had 40 % of the processors" in log.warnings[0]
    assert_recovers(core.scheduler.experience.model, SHAPES)
    assert not folder.exists()
    monkeypatch.setattr(module, "taken", lambda *_: NOTHING)
    calibrate(make_core(profile_dir=str(folder)))
    assert stored(folder)


def test_a_profile_with_a_large_error_is_not_kept(
    make_core: MakeCore, log: Log, tmp_path: Path
) -> None:
    """Every third step takes twice and a half as long, whatever is in it."""
    folder = tmp_path / "profiles"
    core = make_core(profile_dir=str(folder))
    core.engine.stretch = lambda number: 2.5 if number % 3 == 0 else 1.0
    calibrate(core)
    assert "the latency profile is not kept" in log.warnings[0]
    assert not folder.exists()


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ({"slo_tbt_s": 0.02}, "the TBT target of 20 ms cannot be met"),
        ({"slo_ttft_s": 0.04}, "the TTFT target of 40 ms cannot be met"),
        ({}, ""),
    ],
    ids=str,
)
def test_targets_that_cannot_be_met_are_warned_of_with_the_figure(
    make_core: MakeCore, log: Log, targets: dict[str, float], words: str
) -> None:
    core = make_core(**targets)
    calibrate(core)
    assert bool(log.warnings) == bool(words)
    if words:
        (warning,) = log.warnings
        assert words in warning
        model = core.scheduler.experience.model
        least_s = (
            model.predict_s(StepShape(1, 0.0, 1, 128))
            if "TBT" in words
            else model.predict_prefill_s(128)
        )
        assert f"needs {1000 * least_s:.0f} ms" in warning
        (better_ms,) = map(int, re.findall(r"--slo-t\w+-ms (\d+)", warning))
        assert 2000 * least_s <= better_ms < 2200 * least_s
