from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conserve.workload.trace_columns import TraceRow
from conserve.workload.trace_lines import TraceError
from conserve.workload.traces import (
    LengthFormat,
    RatePoint,
    RequestFormat,
    Spelling,
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


def rows_of(path: Path, format: RequestFormat, **how: Any) -> list[TraceRow]:  # noqa: A002
    return list(read_requests(path, Spelling(format, **how)))


def pairs_of(path: Path, format: LengthFormat) -> list[tuple[int, int]]:  # noqa: A002
    found = read_lengths(path, Spelling(format))
    return [found.pair(i) for i in range(len(found))]


def refusal(path: Path, format: LengthFormat, **how: Any) -> str:  # noqa: A002
    with pytest.raises(TraceError) as refused:
        read_lengths(path, Spelling(format, **how))
    return str(refused.value)


def test_azure(write: Write) -> None:
    first, second = rows_of(write("a.csv", AZURE), "azure")
    assert first == TraceRow(0.0, 374, 44)
    assert second.arrival_s == pytest.approx(4.25)
    assert second == TraceRow(second.arrival_s, 396, 109)


@pytest.mark.parametrize(
    "times",
    [
        # The format of 2024 leaves the fraction out of a whole second.
        ("2024-05-12 00:00:03.500000+00:00", "2024-05-12 00:00:04+00:00"),
        ("2024-05-12 00:00:03.5Z", "2024-05-12 00:00:04Z"),
        ("2024-05-12T00:00:03.5000000", "2024-05-12 00:00:04"),
        ("2024-05-12 02:00:03.5+02:00", "2024-05-12 00:00:04"),
    ],
)
def test_azure_s_times_in_every_spelling(write: Write, times: tuple[str, str]) -> None:
    head = "TIMESTAMP,ContextTokens,GeneratedTokens"
    text = "\n".join([head, *(f"{time},5,1" for time in times)])
    assert rows_of(write("a.csv", text), "azure") == [TraceRow(0.0, 5, 1), TraceRow(0.5, 5, 1)]


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + AZURE,
        AZURE.replace(",374,44", ",374.0,44.0"),
        AZURE.replace("\r\n", "\n") + "\n\n \n\x1a",
        AZURE.replace("\r\n", "\r"),
        AZURE.replace("2023-11-16 18:15:46.6805900", '"2023-11-16 18:15:46.6805900"'),
        AZURE.replace(",", ", "),
        AZURE.replace("TIMESTAMP", "more,TIMESTAMP").replace("2023-", "7,2023-"),
    ],
)
def test_a_trace_as_people_save_it(write: Write, text: str) -> None:
    plain = rows_of(write("plain.csv", AZURE), "azure")
    assert rows_of(write("a.csv", text), "azure") == plain


BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    "45.5,GPT-4,1087,0,1087,API log\n"
    "118,ChatGPT,417,276,693,Conversation log\n"
)


def test_burstgpt_leaves_failed_requests_out_and_counts_them(write: Write) -> None:
    found = read_requests(write("b.csv", BURSTGPT), Spelling("burstgpt"))
    assert list(found) == [TraceRow(0.0, 472, 18), TraceRow(113.0, 417, 276)]
    assert found.tokens.num_failed == 1


def test_a_trace_of_failed_requests_alone_says_so(write: Write) -> None:
    failed = "".join(f"{i},20,0\n" for i in range(7))
    path = write("b.csv", f"Timestamp,Request tokens,Response tokens\n{failed}")
    with pytest.raises(TraceError, match="none of its 7 requests has an answer"):
        read_requests(path, Spelling("burstgpt"))


def test_mooncake_is_put_in_order_of_arrival(write: Write) -> None:
    text = (
        '{"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [0, 7]}\n'
        '{"timestamp": 2000, "input_length": 9, "output_length": 3}\n'
        '{"timestamp": 1000, "input_length": 10, "output_length": 0, "hash_ids": [0]}\n'
    )
    # A request that produced nothing still costs its one step.
    expected = [TraceRow(0.0, 10, 1, (0,)), TraceRow(1.0, 9, 3), TraceRow(2.0, 600, 5, (0, 7))]
    for name in ("m.jsonl", "m.json", "m.txt"):
        assert rows_of(write(name, text), "mooncake") == expected


def mooncake(timestamp: float, tokens: int, ids: list[int]) -> str:
    row = {"timestamp": timestamp, "input_length": tokens, "output_length": 5, "hash_ids": ids}
    return json.dumps(row) + "\n"


def test_another_block_size_is_asked_for(write: Write) -> None:
    blocks = list(range(20))
    path = write("m.jsonl", mooncake(0, 320, blocks) + mooncake(1000, 319, blocks))
    assert "line 1: 20 hash_ids for 320 tokens do not stand for 512 each" in refusal(
        path, "mooncake"
    )
    assert "block_tokens" in refusal(path, "mooncake", block_tokens=64)
    first, _ = rows_of(path, "mooncake", block_tokens=16)
    assert first.prefix_ids == tuple(blocks)


def test_full_blocks_alone_may_have_ids(write: Write) -> None:
    path = write("m.jsonl", mooncake(0, 1500, [1, 2]) + mooncake(1, 300, []))
    assert [row.prefix_ids for row in rows_of(path, "mooncake")] == [(1, 2), ()]


@pytest.mark.parametrize("times", [(0.0, 0.75), (0, 1, 2)])
def test_another_unit_of_time_is_asked_for(write: Write, times: tuple[float, ...]) -> None:
    # Two thousand requests in as many milliseconds are more than any trace has.
    rows = [mooncake(time, 10, [1]) * 1000 for time in times]
    path = write("m.jsonl", "".join(rows))
    assert 'timestamp_unit = "s"' in refusal(path, "mooncake")
    assert rows_of(path, "mooncake", timestamp_unit="s")[-1].arrival_s == times[-1]
    assert rows_of(path, "mooncake", timestamp_unit="ms")[-1].arrival_s == times[-1] / 1000


def test_lengths_of_each_format(write: Write) -> None:
    arxiv = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n3772,54,3826,69.8\n"
    assert pairs_of(write("x.csv", arxiv), "arxiv") == [(3772, 54)]
    assert pairs_of(write("a.csv", AZURE), "azure") == [(374, 44), (396, 109)]


def test_a_file_that_changes_is_read_again(write: Write) -> None:
    before = rows_of(write("a.csv", AZURE), "azure")
    assert rows_of(write("a.csv", AZURE + "\n2023-11-16 18:16:00,5,6"), "azure")[:2] == before
    assert len(rows_of(write("a.csv", AZURE + "\n2023-11-16 18:16:00,5,6"), "azure")) == 3


def test_a_request_takes_16_bytes(write: Write) -> None:
    found = read_requests(write("a.csv", AZURE), Spelling("azure"))
    columns = (found.arrival_s, found.tokens.prompt, found.tokens.output)
    assert [column.itemsize for column in columns] == [8, 4, 4]
    assert len(found.prefix_ids) == len(found.prefix_ends) == 0


def test_rates(write: Write) -> None:
    path = write("r.csv", "\ufefft_seconds,requests_per_second\r\n0,212.78\r\n600,179.5\r\n")
    assert read_rates(path) == [RatePoint(0.0, 212.78), RatePoint(600.0, 179.5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (AZURE + "\r\nyesterday,1,2\r\n2023-11-16 18:16:00,x,2", "2 bad rows, the first on line 4"),
        (AZURE + "\r\n2023-11-16 18:16:00,5", "1 bad rows, the first on line 4: 2 columns"),
        (AZURE + "\r\n2023-11-16 18:16:00,5,6,7", "1 bad rows, the first on line 4: 4 columns"),
        (AZURE + "\r\n2023-11-16 18:16:00,-5,1", "line 4: ContextTokens is -5"),
        (AZURE + "\r\n2023-11-16 18:16:00,nan,1", "line 4: ContextTokens is 'nan', no number"),
        (AZURE + "\r\n2023-11-16 18:16:00,9.5,1", "line 4: ContextTokens is '9.5', no whole"),
        (AZURE + "\r\n2023-11-16 18:16:00,1e300,1", "line 4: ContextTokens is 1000"),
        (AZURE + "\r\n20231116,5,1", "line 4: TIMESTAMP is '20231116', no time"),
        (AZURE + "\r\n,,", "line 4: ContextTokens is '', no number"),
        (
            AZURE + '\r\n"2023-11-16 18:16:00,5,1\r\n2023-11-16 18:16:00,5,1',
            "line 4: a stray quote",
        ),
        (
            "TIMESTAMP,Tokens\n2023-11-16 18:16:00,5\n",
            "no column 'ContextTokens' in the first line",
        ),
        (AZURE.replace(",", ";"), "no column 'TIMESTAMP' .*columns must be separated by commas"),
        (BURSTGPT, "no column 'TIMESTAMP' in the first line, 'Timestamp,Model"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no rows"),
        ("", "no rows"),
    ],
)
def test_bad_rows_stop_with_count_and_line(write: Write, text: str, message: str) -> None:
    with pytest.raises(TraceError, match=f"bad.csv: .*{message}"):
        read_requests(write("bad.csv", text), Spelling("azure"))


def test_a_stray_quote_is_one_bad_row(write: Write) -> None:
    rows = [f"2023-11-16 18:15:{i % 60:02d},80,10\n" for i in range(12_000)]
    rows[2] = '"' + rows[2]
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(rows)
    assert "1 bad rows, the first on line 4: a stray quote" in refusal(
        write("q.csv", text), "azure"
    )


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1]",
        '{"timestamp": 1}',
        '"text"',
        "7",
        "[" * 100_000,
        '{"timestamp": NaN, "input_length": 6, "output_length": 5}',
        '{"timestamp": 1, "input_length": NaN, "output_length": 5}',
        '{"timestamp": true, "input_length": 6, "output_length": 5}',
        '{"timestamp": 1, "input_length": 6, "output_length": null}',
        '{"timestamp": 1, "input_length": 6, "output_length": 5, "hash_ids": [-1]}',
        '{"timestamp": 1, "input_length": 6, "output_length": 5, "hash_ids": 7}',
    ],
)
def test_bad_json_lines_are_bad_rows(write: Write, line: str) -> None:
    good = '{"timestamp": 0, "input_length": 6, "output_length": 5, "hash_ids": []}\n'
    told = refusal(write("bad.jsonl", f"{good}{line}\n{good}"), "mooncake")
    assert "1 bad rows, the first on line 2" in told


def test_an_array_is_named(write: Write) -> None:
    told = refusal(write("m.json", f"[{mooncake(0, 5, [])}]"), "mooncake")
    assert "an array: write one object a line" in told


@pytest.mark.parametrize("row", ["600,-1", "600,nan", "600,inf", "x,1", "nan,1", "-inf,1"])
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
