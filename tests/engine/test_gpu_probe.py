"""The probes of `benchmarks/gpu` on a CPU: their figures mean nothing there, but they run."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch

from conserve.engine.beside import our_metadata
from conserve.engine.safepoints import Safepoints
from conserve.engine.settings import EngineSettings
from conserve.engine.stoppable import StoppableSteps
from conserve.engine.unwind import UnwindV2
from tests.engine.device import Device
from tests.engine.engine import BLOCK_SIZE, Engine, make_scheduler

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
pytestmark = pytest.mark.engine


def engine_with(kv: torch.Tensor) -> Any:
    """As much of an engine as the probe looks at: layers that hold their KV, [blocks, ...]."""
    layers = {f"layer{i}": SimpleNamespace(kv_cache=layer) for i, layer in enumerate(kv)}
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=layers | {"norm": object()}),
        cache_config=SimpleNamespace(num_gpu_blocks=kv.shape[1]),
    )
    return SimpleNamespace(scheduler=SimpleNamespace(vllm_config=config))


def test_the_products_copies_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    probe = import_module("probe_checkpoints")
    monkeypatch.setattr(probe, "NUM_REPEATS", 1)
    link = probe.Link(engine_with(torch.rand(2, 40, 2, 16, 8)))
    found = probe.measure(link)
    for store in (True, False):
        with link.busy(store=store):
            pass
    link.close()
    assert found["slot_bytes"] == 2 * 2 * 16 * 8 * 4
    waits = [
        run["wait_s"] > 0 for one in found["copies"] if one["waited_for"] for run in one["runs"]
    ]
    assert waits
    assert all(waits)
    assert {one["store"] for one in found["copies"]} == {True, False}
    for run in (run for one in found["copies"] for run in one["runs"]):
        # What the host waits for is no part of the device's time.
        assert run["seconds"] > found["slot_bytes"] / run["bytes_per_s"] > 0


NUM_LAYERS = 8
LONG_S = 60.0


class Worker:
    """A pretend device behind our worker's steps. With `is_patient` a step that may be stopped
    goes on until it is."""

    def __init__(self, scheduler: Any) -> None:
        nothing = SimpleNamespace(finish_forward=lambda: None, post_forward=lambda names: None)
        self.model_runner = SimpleNamespace(
            kv_connector=nothing, execute_model=self._forward, sample_tokens=lambda _: None
        )
        self.safepoints = Safepoints(scheduler.stopper.flag, rank=0)
        self._steps = StoppableSteps(UnwindV2(self.model_runner), safepoints=self.safepoints)
        self.device = Device(BLOCK_SIZE)
        self.is_patient = False
        self.every: list[int] = []
        """Layers between looks, in each step that could be stopped."""

    def run(self, output: Any, stop_at: int | None = None) -> Any:
        """As the engine calls its device: what a stop leaves half-written is half-written here."""
        ours = our_metadata(output.kv_connector_metadata)
        if ours.stoppable_step is not None:
            self.every.append(ours.every)
            self.safepoints.begin(ours.stoppable_step, ours.every)
        self._steps.execute(lambda it: self.model_runner.execute_model(it), output)
        assert self._steps.unwinding is not None
        layers_done = self._steps.unwinding.layers_done
        self._steps.sample(lambda it: self.model_runner.sample_tokens(it), None)
        return self.device.run(output, stop_at=layers_done)

    def _forward(self, output: Any) -> None:
        for _ in range(NUM_LAYERS):
            self.safepoints.at_layer()
        until_s = time.monotonic() + LONG_S
        while self.is_patient and self.safepoints._step is not None:
            assert time.monotonic() < until_s, "nobody stops it"
            time.sleep(1e-4)
            self.safepoints.at_layer()


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Any]:
    """As much of an engine core as the probes drive: the real scheduler, and that worker."""
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher

    settings = EngineSettings(profile_seconds=0, stop_response_s=1.0)
    scheduler = make_scheduler(tmp_path, num_blocks=2048, max_num_seqs=16, settings=settings)
    worker = Worker(scheduler)
    engine = Engine(scheduler, worker, stop=lambda step: False)
    driver_worker = SimpleNamespace(worker=worker)
    yield SimpleNamespace(
        scheduler=scheduler,
        step_fn=engine.step_fn,
        add_request=engine.add,
        request_block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
        model_executor=SimpleNamespace(driver_worker=driver_worker),
    )
    scheduler.shutdown()


@pytest.fixture
def probe(core: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return import_module("probe").Probe(core, time.perf_counter() + LONG_S, tmp_path)


def test_an_engine_is_described(probe: Any) -> None:
    found = probe.describe()
    assert found["can_stop"]
    assert found["num_layers"] == NUM_LAYERS
    machine = import_module("probe_steps")._machine(probe)
    assert machine["block_size"] == BLOCK_SIZE
    assert machine["kv_bytes_per_token"] == 2 * NUM_LAYERS * 2 * 8 * 2


def test_steps_are_timed(probe: Any) -> None:
    samples = import_module("probe_steps").measure(probe)["samples"]
    assert {num_decodes for _, _, num_decodes, _, _ in samples} >= {0, 1, 4}
    assert all(seconds > 0 for *_, seconds in samples)
    assert not probe.scheduler.requests


def test_a_small_engine_gets_a_model_too(probe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sweeps over its few sizes would be less than a fit needs."""
    steps = import_module("probe_steps")
    for sizes in ("CHUNKS", "CONTEXTS", "DECODES", "DECODE_CONTEXTS"):
        monkeypatch.setattr(steps, sizes, getattr(steps, sizes)[:2])
    guessed = probe.scheduler.experience.recalibrator
    steps.learn(probe)
    assert probe.scheduler.experience.recalibrator is not guessed
    assert steps.measure(probe)["mean_error_held_out"] >= 0


def test_looks_are_as_close_as_they_are_forced_to_be(
    probe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = import_module("probe_stops")
    monkeypatch.setattr(stops, "NUM_PAIRS", 3)
    learned = probe.scheduler.experience.look_cost
    chosen, forced = stops.overhead(probe)["pairs"]
    assert chosen["chosen"]
    assert not forced["chosen"]
    assert chosen["every"] > forced["every"] == 1
    assert len(forced["watched_s"]) == len(forced["plain_s"]) == 3
    # Four steps of either kind could be stopped, the first of them to warm up.
    assert probe.worker.every[-4:] == [1] * 4
    assert 1 not in probe.worker.every[:-4]
    assert len(probe.worker.every) == 8
    assert probe.scheduler.experience.look_cost is learned


def test_every_stop_is_timed(probe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stops = import_module("probe_stops")
    monkeypatch.setattr(stops, "NUM_STOPS", 3)
    probe.worker.is_patient = True
    found = stops.response(probe)
    assert len(found["stops"]) == 3
    for stop in found["stops"]:
        assert stop["rolled_back"]
        assert 0 < stop["unwound_s"] <= stop["idle_s"] < LONG_S
    assert set(found["idle_ms"]) == {str(stop["num_tokens"]) for stop in found["stops"]}
    for times_ms in found["idle_ms"].values():
        assert set(times_ms) == {"p50", "p99", "max"}


def test_what_the_engine_believes_is_put_beside_the_device(probe: Any) -> None:
    planner = probe.scheduler.driver.planner
    found = import_module("probe_belief").measure(probe)
    assert found["num_steps"] > 12
    assert {round(believed, 6) for believed, _ in found["pairs"]} == {0.05}
    assert probe.scheduler.driver.planner == planner
    assert not probe.scheduler.requests


def test_copies_that_were_timed_outlive_what_is_measured_after_them(
    probe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, copies = import_module("probe_checkpoints"), import_module("probe_copies")
    link = checkpoints.Link(engine_with(torch.rand(2, 40, 2, 16, 8)))
    monkeypatch.setattr(checkpoints, "NUM_REPEATS", 1)
    monkeypatch.setattr(copies, "Link", lambda probe: link)

    def cut_off(*_: Any) -> None:
        raise TimeoutError

    monkeypatch.setattr(copies, "_effect", cut_off)
    with pytest.raises(TimeoutError):
        copies.measure(probe)
    link.close()
    folder = import_module("measured").Folder(probe.folder)
    assert folder.part("copies")["rates"]
    assert folder.link_bytes_per_s > 0
    assert not (probe.folder / "copies.json").is_file()


def test_a_part_that_fails_costs_no_other(
    core: Any, probe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine_probe = import_module("engine_probe")
    broken = True

    def first(probe: Any) -> dict[str, Any]:
        name = probe.add(96)
        probe.step({name: 32})
        if broken:
            raise ValueError("no such kernel")
        probe.drop_all()
        return {"is_late": probe.is_late}

    def second(probe: Any) -> dict[str, Any]:
        assert not probe.scheduler.requests, "what the first left"
        return {"deadline_s": probe.deadline_s}

    monkeypatch.setattr(engine_probe, "PARTS", {"first": (0.75, first), "second": (0.25, second)})

    def measure(*parts: str) -> list[str]:
        end_s = time.perf_counter() + LONG_S
        failed: list[str] = engine_probe.measure(core, [*parts], end_s, probe.folder, 3.0)
        return failed

    assert measure("first", "second") == ["first"]
    assert "no such kernel" in (probe.folder / "first-failed.txt").read_text()
    assert not (probe.folder / "first.json").is_file()
    assert import_module("measured").Folder(probe.folder).part("second")["ready_s"] == 3.0
    broken = False
    assert measure("first") == []
    assert not (probe.folder / "first-failed.txt").is_file()
    assert not import_module("measured").Folder(probe.folder).part("first")["is_late"]


def test_parts_share_what_is_left(core: Any, probe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last has all of it, whatever those before it took."""
    engine_probe, deadlines = import_module("engine_probe"), list[float]()

    def part(probe: Any) -> dict[str, Any]:
        deadlines.append(probe.deadline_s)
        return {}

    monkeypatch.setattr(engine_probe, "PARTS", {"a": (0.5, part), "b": (0.1, part)})
    end_s = time.perf_counter() + LONG_S
    assert engine_probe.measure(core, ["a", "b"], end_s, probe.folder, 1.0) == []
    assert deadlines[0] < end_s - LONG_S / 10
    assert deadlines[1] == pytest.approx(end_s)


def test_a_bare_machine_is_asked_for_what_every_start_imports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    check, vllm = import_module("check"), find_spec("vllm")
    assert vllm
    assert vllm.origin
    root = Path(vllm.origin).parent
    warm_up = (root / "model_executor" / "warmup" / "kernel_warmup.py").read_text()
    assert "from vllm.model_executor.warmup.minimax_m3_msa_warmup import" in warm_up
    text = (root / "transformers_utils" / "processors" / "minimax_m3.py").read_text()
    imported = re.findall(r"^from ((?:torchvision|transformers)\.\w+) import", text, re.MULTILINE)
    assert set(check.BARE) <= set(imported)
    monkeypatch.setattr("sys.argv", ["check.py", "--bare"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main() == 0
    assert "check: all is there" in capsys.readouterr().out
