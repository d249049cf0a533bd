"""What benchmarks/gpu makes of what came back: the simulator's constants, and the report's rows."""

from __future__ import annotations

import json
import shutil
import tomllib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from conserve.core.calibration import fit
from conserve.core.latency import StepShape
from conserve.sim.cost import profile_shapes
from conserve.sim.profiles import load_profile
from conserve.sim.roofline import Gpu, Roofline

REHEARSED = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu-rehearsal"
KNOWN = load_profile("h100/llama-3.1-8b")


def another_gpu() -> Gpu:
    """One that no table has."""
    assert isinstance(KNOWN.cost, Roofline)
    return replace(KNOWN.cost.gpu, matmul_efficiency=0.71, attention_efficiency=0.45, step_s=0.0031)


def measured_on(gpu: Gpu) -> list[tuple[StepShape, float]]:
    assert isinstance(KNOWN.cost, Roofline)
    truth = Roofline(gpu, KNOWN.cost.model)
    return [(shape, truth.predict_s(shape)) for shape in profile_shapes(8192)]


def write_parts(folder: Path, gpu: Gpu) -> None:
    """The files of a run on that GPU, as far as constants come of them."""
    samples = measured_on(gpu)
    rows = [
        [s.num_tokens, s.attention_pairs, s.num_decodes, s.decode_context, seconds]
        for s, seconds in samples
    ]
    machine = {"num_blocks": 27000, "block_size": 16, "max_running": 1024, "max_step_tokens": 8192,
               "num_layers": 32, "kv_bytes_per_token": 131072}  # fmt: skip
    steps = {"samples": rows, "machine": machine, "model": asdict(fit(samples)),
             "mean_error_held_out": 0.02}  # fmt: skip
    pairs = [
        {"num_tokens": 8192, "every": every, "chosen": every == 3, "plain_s": [0.2] * 3,
         "watched_s": [0.2 + 20e-6 * 32 / every] * 3, "median_overhead_ratio": 0.001}
        for every in (3, 1)
    ]  # fmt: skip
    copies = {"checkpoints": {"copies": [
        {"num_blocks": 1024, "store": True, "scattered": True, "waited_for": False,
         "runs": [{"host_s": 1e-4, "wait_s": 0.0, "bytes_per_s": 41e9}]}]}, "effect": [],
    }  # fmt: skip
    overhead = {"pairs": pairs, "engine": {"num_layers": 32}}
    for name, part in {"steps": steps, "overhead": overhead, "copies": copies}.items():
        (folder / f"{name}.json").write_text(json.dumps(part))


def test_constants_are_found_again_in_the_steps_they_made(tmp_path: Path, script: Any) -> None:
    truth = another_gpu()
    write_parts(tmp_path, truth)
    found = script("measured").fitted_gpu(script("measured").Folder(tmp_path))
    for name in ("matmul_efficiency", "attention_efficiency", "bytes_efficiency", "step_s"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.05), name
    assert found.link_bytes_per_s == 41e9
    assert found.safepoint_s == pytest.approx(20e-6)


def test_replaced_constants_are_what_the_simulator_reads(tmp_path: Path, script: Any) -> None:
    measured = script("measured")
    file = tmp_path / "gpus.toml"
    file.write_text(script("report").GPUS.read_text())
    before = tomllib.loads(file.read_text())
    measured.replace_constants(file, "h100", another_gpu())
    after = tomllib.loads(file.read_text())
    assert after["h100"]["matmul_efficiency"] == 0.71
    assert after["h100"]["attention_efficiency"] == 0.45
    assert after["h100"]["flops"] == before["h100"]["flops"]
    assert "measured" in after["h100"]["link_source"]
    del before["h100"], after["h100"]
    assert after == before


def test_the_profile_is_one_that_the_simulator_takes(tmp_path: Path, script: Any) -> None:
    write_parts(tmp_path, another_gpu())
    profile = script("measured").Folder(tmp_path).profile
    script("measured").write_profile(profile, tmp_path / "profile.toml")
    read = load_profile(str(tmp_path / "profile.toml"))
    assert read.machine == profile.machine
    assert read.machine.safepoint_layers == 3
    assert read.cost == profile.cost


def test_a_report_is_made_of_whatever_came_back(tmp_path: Path, script: Any) -> None:
    report, folder = script("report"), script("measured").Folder(tmp_path)
    assert report.rows(folder) == []
    (tmp_path / "steps.json").write_text(json.dumps({"samples": [], "fit": "10 samples"}))
    assert [row.measured for row in report.rows(folder)] == ["no model: 10 samples"]
    assert "Not measured, or not brought back" in "\n".join(report.heading(folder))
    write_parts(tmp_path, another_gpu())
    told = {row.what: row for row in report.rows(folder)}
    assert told["2,048 tokens behind 0, by the fitted model"].paper == "51 ms"
    assert told["1024 blocks, store"].measured == "41.0 GB/s"
    page = "before\n<!-- gpu -->\nold\n<!-- /gpu -->\n<!-- gpu aims --><!-- /gpu aims -->\nafter\n"
    filled = report.filled_in(page, list(told.values()))
    assert "old" not in filled
    assert filled.endswith("<!-- /gpu aims -->\nafter\n")
    assert filled.count("| 41.0 GB/s |") == 1
    assert filled.count("| under 0.5 % |") == 4
    with pytest.raises(SystemExit, match="no <!-- gpu -->"):
        report.filled_in("a page without marks", [])


def test_stops_are_told_by_the_size_of_their_step(tmp_path: Path, script: Any) -> None:
    """One layer of a long step takes longer than what is aimed at."""
    stops = [
        {"num_tokens": size, "idle_s": size * 1e-6 * i, "unwound_s": size * 1e-7 * i}
        for size in (512, 2048, 8192)
        for i in (1, 2)
    ]
    (tmp_path / "response.json").write_text(json.dumps({"stops": stops}))
    rows = list(script("report").response(script("measured").Folder(tmp_path)))
    idle = {row.what.split()[6]: row for row in rows if "idle" in row.what}
    assert {size: row.aim for size, row in idle.items()} == {
        "512": "P99 under 5 ms", "2048": "P99 under 5 ms", "8192": "-",
    }  # fmt: skip
    assert idle["512"].measured == "0.8, 1.0, 1.0 ms"
    assert [row.measured for row in rows if "unwound" in row.what] == ["0.1 ms", "0.4 ms", "1.6 ms"]


@pytest.mark.parametrize("left_out", ["", "steps.json", "load", "environment.json"])
def test_the_rehearsal_s_folder_makes_a_report(tmp_path: Path, script: Any, left_out: str) -> None:
    """All of what a run leaves, and all but a part of it."""
    shutil.copytree(REHEARSED / "out", tmp_path / "out")
    gone = tmp_path / "out" / left_out
    if gone.is_dir() and left_out:
        shutil.rmtree(gone)
    elif left_out:
        gone.unlink()
    report, folder = script("report"), script("measured").Folder(tmp_path / "out")
    told = "\n".join(row.what for row in report.rows(folder))
    assert "requests answered" in told
    assert "stop to idle device" in told
    assert ("by the fitted model" in told) is (left_out != "steps.json")
    assert ("chats within targets" in told) is (left_out != "load")
