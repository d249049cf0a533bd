from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve.core.snapshot import Targets
from conserve.metrics import (
    CUT_OFF,
    BadRecordError,
    RequestRecord,
    goodput_rps,
    meets,
    read_records,
    slo_attainment,
    summarise,
    tbt_attainment,
    throughput,
    ttft_attainment,
    write_records,
)


def chat(arrival_s: float, *times: float, error: str | None = None) -> RequestRecord:
    return RequestRecord("chat", True, arrival_s, list(times), 100, len(times), error)


def batch(arrival_s: float, *times: float, error: str | None = None) -> RequestRecord:
    return RequestRecord("line", False, arrival_s, list(times), 1000, len(times), error)


def test_the_three_latencies() -> None:
    record = chat(1.0, 1.5, 1.6, 2.0)
    assert record.ttft_s == pytest.approx(0.5)
    assert record.tbts_s == pytest.approx([0.1, 0.4])
    assert record.tpot_s == pytest.approx(0.25)


def test_latencies_that_do_not_exist_are_none() -> None:
    assert chat(1.0).ttft_s is None
    assert chat(1.0, 2.0).tpot_s is None
    assert chat(1.0, 2.0).tbts_s == []


@pytest.mark.parametrize("name", ["records.jsonl", "records.jsonl.gz"])
def test_records_survive_a_file_and_its_bytes_are_stable(tmp_path: Path, name: str) -> None:
    records = [chat(0.25, 0.5, 0.75), batch(-3.0, error=CUT_OFF), chat(1.0, error="503")]
    write_records(tmp_path / name, records)
    first = (tmp_path / name).read_bytes()
    assert read_records(tmp_path / name) == records
    write_records(tmp_path / name, records)
    assert (tmp_path / name).read_bytes() == first


@given(st.lists(st.floats(0, 1e5), max_size=20).map(sorted))
def test_a_file_keeps_times_to_the_microsecond(times: list[float]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.jsonl"
        write_records(path, [chat(0.0, *times)])
        assert read_records(path)[0].token_times_s == pytest.approx(times, abs=1e-6)


@pytest.mark.parametrize("line", ["not json", '{"request_id": "a"}', "[1]", '{"color": 1}'])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "r.jsonl"
    write_records(path, [chat(0.0)])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(BadRecordError, match="line 2"):
        read_records(path)


def test_targets_count_requests_gaps_and_failures() -> None:
    targets = Targets(ttft_s=1.0, tbt_s=0.2)
    good = chat(0.0, 1.0, 1.1, 1.4)  # TPOT 0.2 although one gap is 0.3
    late = chat(0.0, 1.01, 1.1)
    slow = chat(0.0, 0.5, 1.0)
    broken = chat(0.0, 0.1, error="503")
    records = [good, late, slow, broken]
    assert [meets(r, targets) for r in records] == [True, False, False, False]
    assert slo_attainment(records, targets) == 0.25
    assert ttft_attainment(records, targets) == 0.75
    assert tbt_attainment(records, targets) == 0.5
    assert goodput_rps(records, targets, 10.0) == pytest.approx(0.1)
    assert slo_attainment([], targets) is None


def test_throughput_counts_prompt_at_first_token_and_finish_at_last() -> None:
    inside = batch(-5.0, 1.0, 9.0)
    over_the_end = batch(0.0, 9.5, 10.0)
    before = batch(-5.0, -2.0, 0.5)
    cut = batch(0.0, 5.0, error=CUT_OFF)
    got = throughput([inside, over_the_end, before, cut], 0.0, 10.0)
    assert got.prompt_tps == 300.0
    assert got.output_tps == pytest.approx(0.5)
    assert got.finished_rps == 0.2


def test_throughput_of_adjoining_windows_adds_up() -> None:
    records = [batch(0.0, 1.0, 2.0, 3.0, 4.0), chat(0.0, 2.0, 3.5)]
    whole = throughput(records, 0.0, 5.0)
    parts = [throughput(records, 0.0, 2.0), throughput(records, 2.0, 5.0)]
    assert whole.output_tps * 5 == pytest.approx(parts[0].output_tps * 2 + parts[1].output_tps * 3)
    assert whole.prompt_tps * 5 == pytest.approx(parts[0].prompt_tps * 2 + parts[1].prompt_tps * 3)


def test_summary_keeps_the_classes_apart() -> None:
    records = [
        chat(0.0, 0.5, 0.6),
        chat(1.0, 2.5, 2.6),
        chat(11.0, 11.1),  # after the window
        chat(2.0, error="503"),
        batch(-1.0, 1.0, 2.0),
        batch(1.0, 3.0, error=CUT_OFF),
        batch(1.0, error="500"),
    ]
    summary = summarise(records, 10.0, Targets())
    assert (summary.num_online, summary.num_online_failed) == (3, 1)
    assert (summary.num_offline_finished, summary.num_offline_failed) == (1, 1)
    assert summary.ttft_p50_s == pytest.approx(1.0)
    assert summary.slo_attainment == pytest.approx(1 / 3)
    assert summary.offline_tps == pytest.approx(200.3)
    assert summary.online_prompt_tps == 20.0
    assert summary.total_tps == pytest.approx(200.3 + 20.4)


def test_tokens_of_the_window_count_whenever_their_request_was_sent() -> None:
    """Chats of the lead-in have their say in throughput, and not in latency."""
    records = [chat(-3.0, -1.0, 1.0, 2.0), chat(-3.0, 4.0), chat(1.0, 2.0)]
    summary = summarise(records, 10.0, Targets())
    assert summary.num_online == 1
    assert summary.ttft_p99_s == pytest.approx(1.0)
    assert summary.online_output_tps == pytest.approx(0.4)
    assert summary.online_prompt_tps == pytest.approx(20.0)
    got = throughput(records, 0.0, 10.0)
    assert summary.total_tps == got.prompt_tps + got.output_tps


def test_summary_without_online_has_no_latency() -> None:
    summary = summarise([batch(0.0, 1.0)], 10.0, Targets())
    assert summary.ttft_p99_s is None
    assert summary.goodput_rps is None
    assert summary.offline_output_tps == 0.1
