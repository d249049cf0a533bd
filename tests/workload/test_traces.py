from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from conserve.workload.traces import (
    RatePoint,
    TraceError,
    TraceRow,
    read_lengths,
    read_rates,
    read_requests,
)

Write = Callable[[str, str], Path]

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9305900,396,109"
)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode())
        return path

    return write


def test_azure(write: Write) -> None:
    rows = read_requests(write("a.csv", AZURE), "azure")
    first, second = rows
    assert first == TraceRow(0.0, 374, 44)
    assert second.arrival_s == pytest.approx(4.25)
    assert second == TraceRow(second.arrival_s, 396, 109)


def test_mooncake_is_put_in_order_of_arrival(write: Write) -> None:
    text = (
        '{"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [0, 7]}\n'
        '{"timestamp": 1000, "input_length": 10, "output_length": 0, "hash_ids": [0]}\n'
    )
    rows = read_requests(write("m.jsonl", text), "mooncake")
    # A request that produced nothing still costs its one step.
    assert rows == [TraceRow(0.0, 10, 1, (0,)), TraceRow(2.0, 600, 5, (0, 7))]


def test_lengths_of_each_format(write: Write) -> None:
    arxiv = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n3772,54,3826,69.8\n"
    assert read_lengths(write("x.csv", arxiv), "arxiv") == [(3772, 54)]
    assert read_lengths(write("a.csv", AZURE), "azure") == [(374, 44), (396, 109)]


def test_rates(write: Write) -> None:
    path = write("r.csv", "t_seconds,requests_per_second\n0,212.78\n600,179.5\n")
    assert read_rates(path) == [RatePoint(0.0, 212.78), RatePoint(600.0, 179.5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (AZURE + "\r\nyesterday,1,2\r\n2023-11-16 18:16:00,x,2", "2 bad rows, the first on line 4"),
        (AZURE + "\r\n2023-11-16 18:16:00,5", "1 bad rows, the first on line 4"),
        (AZURE + "\r\n2023-11-16 18:16:00,-5,1", "line 4: ContextTokens is -5"),
        ("TIMESTAMP,Tokens\n2023-11-16 18:16:00,5\n", "line 2: no column 'ContextTokens'"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no rows"),
    ],
)
def test_bad_rows_stop_with_count_and_line(write: Write, text: str, message: str) -> None:
    with pytest.raises(TraceError, match=f"bad.csv: .*{message}"):
        read_requests(write("bad.csv", text), "azure")


@pytest.mark.parametrize("line", ["not json", "[1]", '{"timestamp": 1}', '"text"', "7"])
def test_bad_json_lines_are_bad_rows(write: Write, line: str) -> None:
    good = '{"timestamp": 0, "input_length": 6, "output_length": 5, "hash_ids": []}\n'
    with pytest.raises(TraceError, match="1 bad rows, the first on line 2"):
        read_requests(write("bad.jsonl", f"{good}{line}\n{good}"), "mooncake")


@pytest.mark.parametrize("row", ["600,-1", "600,nan", "600,inf", "x,1"])
def test_bad_rates(write: Write, row: str) -> None:
    with pytest.raises(TraceError, match="1 bad rows, the first on line 3"):
        read_rates(write("r.csv", f"t_seconds,requests_per_second\n0,1\n{row}\n"))


def test_rates_must_rise_in_time(write: Write) -> None:
    with pytest.raises(TraceError, match=r"t_seconds falls from 5.0 to 5.0"):
        read_rates(write("r.csv", "t_seconds,requests_per_second\n5,1\n5,1\n"))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read"):
        read_rates(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(TraceError, match="cannot be read"):
        read_rates(tmp_path / "b.csv")
