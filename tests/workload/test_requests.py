from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conserve.workload import Scenario, ScenarioError, TraceError, build_workload

FIXED = {"kind": "fixed", "tokens": 10}
LENGTHS = {"kind": "independent", "prompt": FIXED, "output": FIXED}
GAMMA = {"kind": "gamma", "rate_rps": 2.0}


def scenario(**changes: Any) -> Scenario:
    table = {
        "name": "made-up",
        "about": "A test.",
        "duration_s": 10,
        "online": {"arrivals": GAMMA, "lengths": LENGTHS},
        "offline": {"in_flight": 2, "num_requests": 50, "lengths": LENGTHS},
        **changes,
    }
    return Scenario.of(table, "made-up")


def replay(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "replay",
        "trace": "t",
        "format": "mooncake",
        "rate_rps": 1,
        "mean_prompt_tokens": 100,
        "mean_output_tokens": 10,
        "max_prompt_tokens": 150,
        "max_output_tokens": 12,
        **changes,
    }


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    path = tmp_path / "m.jsonl"
    rows = []
    for i in range(60):
        tokens = 1000 + 200 * (i % 5)
        own = range(10 * i + 1, 10 * i + -(-tokens // 512))
        row = {"timestamp": 1000 * i, "input_length": tokens, "output_length": 20}
        rows.append(json.dumps({**row, "hash_ids": [0, *own]}) + "\n")
    path.write_text("".join(rows))
    return path


def test_a_seed_gives_one_workload_and_another_gives_another() -> None:
    one = build_workload(scenario(), 1, {})
    assert one == build_workload(scenario(), 1, {})
    assert one.online != build_workload(scenario(), 2, {}).online


def test_changing_the_offline_work_leaves_online_arrivals_alone() -> None:
    changed = scenario(offline={"in_flight": 9, "num_requests": 7, "lengths": LENGTHS})
    assert build_workload(scenario(), 1, {}).online == build_workload(changed, 1, {}).online


def test_ids_are_unique_and_classes_apart() -> None:
    workload = build_workload(scenario(), 1, {})
    everything = workload.online + workload.offline
    assert len({plan.request_id for plan in everything}) == len(everything)
    assert all(plan.online for plan in workload.online)
    assert not any(plan.online for plan in workload.offline)
    assert {plan.arrival_s for plan in workload.offline} == {-8.0}
    assert workload.in_flight == 2


def test_all_at_once_is_as_many_as_there_are() -> None:
    offline = {"in_flight": "all", "num_requests": 50, "lengths": LENGTHS}
    assert build_workload(scenario(offline=offline), 1, {}).in_flight == 50


def test_shared_prefixes_leave_a_token_of_ones_own() -> None:
    shared = {"num_prefixes": 3, "tokens": 500}
    offline = {"num_requests": 60, "lengths": LENGTHS, "shared_prefix": shared}
    plans = build_workload(scenario(offline=offline), 1, {}).offline
    assert {plan.prefix[0][0] for plan in plans} == {"shared-0", "shared-1", "shared-2"}
    assert {plan.prefix[0][1] for plan in plans} == {9}


def test_a_replay_is_scaled_cut_and_keeps_its_blocks(mooncake: Path) -> None:
    workload = build_workload(scenario(online={"arrivals": replay()}), 1, {"t": mooncake})
    (scale,) = workload.scales
    assert scale.time == pytest.approx(1.0)
    assert scale.prompt == pytest.approx(100 / 1400)
    assert 8 <= len(workload.online) <= 11
    for plan in workload.online:
        assert plan.num_prompt_tokens <= 150
        assert plan.num_output_tokens == 10
        assert sum(tokens for _, tokens in plan.prefix) <= plan.num_prompt_tokens
        assert plan.prefix[0] == ("block-0", 37)
    own = [plan.prefix[1][0] for plan in workload.online]
    assert len(set(own)) == len(own)


def test_blocks_of_another_size_keep_theirs(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    row = {"input_length": 160, "output_length": 20, "hash_ids": list(range(10))}
    path.write_text("".join(json.dumps({"timestamp": i, **row}) + "\n" for i in range(60)))
    how = replay(block_tokens=16, timestamp_unit="s", mean_prompt_tokens=80)
    plans = build_workload(scenario(online={"arrivals": how}), 1, {"t": path}).online
    assert {plan.prefix for plan in plans} == {tuple((f"block-{n}", 8) for n in range(10))}


def test_only_mooncake_s_format_is_asked_for_blocks() -> None:
    with pytest.raises(ScenarioError, match="block_tokens: only the format mooncake has it"):
        scenario(online={"arrivals": replay(format="azure", block_tokens=16)})


def test_failed_requests_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "b.csv"
    rows = "".join(f"{i},20,{5 * (i % 4 != 1)}\n" for i in range(60))
    path.write_text(f"Timestamp,Request tokens,Response tokens\n{rows}")
    how = replay(format="burstgpt")
    workload = build_workload(scenario(online={"arrivals": how}), 1, {"t": path})
    assert str(workload.scales[0]).endswith(", 15 failed requests left out")


def test_lengths_from_a_trace(mooncake: Path) -> None:
    spec = {k: v for k, v in replay().items() if k != "rate_rps"}
    offline = {"num_requests": 200, "lengths": {**spec, "kind": "trace"}}
    workload = build_workload(scenario(offline=offline), 1, {"t": mooncake})
    assert {plan.num_prompt_tokens for plan in workload.offline} == {71, 86, 100, 114, 129}
    assert str(workload.scales[0]).startswith("t: time x 1, prompts x 0.07143")


def test_a_diurnal_run_follows_its_trace(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("t_seconds,requests_per_second\n0,0\n600,300\n1200,0\n1800,100\n")
    arrivals = {"kind": "diurnal", "trace": "r", "rate_rps": 20, "trace_seconds": 2400}
    online = {"arrivals": arrivals, "lengths": LENGTHS}
    workload = build_workload(scenario(online=online, duration_s=40), 1, {"r": path})
    quarters = [sum(int(p.arrival_s // 10) == q for p in workload.online) for q in range(4)]
    assert quarters[0] == quarters[2] == 0
    assert quarters[1] == pytest.approx(600, rel=0.15)
    assert quarters[3] == pytest.approx(200, rel=0.25)


def test_a_missing_trace_is_named() -> None:
    with pytest.raises(ScenarioError, match=r"needs the trace 't': .*--trace t=PATH"):
        build_workload(scenario(online={"arrivals": replay()}), 1, {})


def test_a_trace_too_short_for_the_run_is_refused(mooncake: Path) -> None:
    long = scenario(online={"arrivals": replay()}, duration_s=600)
    with pytest.raises(ScenarioError, match="made-up: the trace holds 59 s"):
        build_workload(long, 1, {"t": mooncake})


def test_a_bad_trace_stays_a_trace_error(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("nothing\n")
    with pytest.raises(TraceError, match="1 bad rows, the first on line 1"):
        build_workload(scenario(online={"arrivals": replay()}), 1, {"t": path})
