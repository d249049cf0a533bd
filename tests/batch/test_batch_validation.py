"""Input files, good and bad: what is found, where, and that chunks do not matter."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve.batch.first_line import first_model
from conserve.batch.jsonl import num_lead_bytes
from conserve.batch.outcome import offline_body
from conserve.batch.prefix import prefix_key
from conserve.batch.request_line import MAX_N, body_of
from conserve.batch.rules import MAX_OUTPUT_TOKENS, ModelLimits, Rules
from conserve.batch.validation import LineIndex, Validation, validate
from tests.batch.builders import CHAT, MODEL, jsonl, line, numbered

RULES = Rules(endpoint=CHAT, models={MODEL: ModelLimits(100)}, max_lines=50, max_line_bytes=2000)


def index(
    content: bytes, rules: Rules = RULES, step: int = 64
) -> tuple[list[LineIndex], Validation]:
    validation = Validation(rules)
    found: list[LineIndex] = []
    for start in range(0, len(content), step):
        found += validation.feed(content[start : start + step])
        if validation.done_early:
            return found, validation
    found += validation.finish()
    return found, validation


def codes(content: bytes, rules: Rules = RULES) -> list[tuple[int | None, str, str | None]]:
    return [(e.line, e.code, e.param) for e in validate([content], rules).errors]


@given(
    st.lists(st.text(max_size=40), max_size=20),
    st.integers(1, 200),
    st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
    st.booleans(),
)
def test_the_index_points_at_every_line(
    prompts: list[str], step: int, newline: bytes, ended: bool
) -> None:
    rows = [line(f"id {n} é", prompt) for n, prompt in enumerate(prompts)]
    content = newline.join(json.dumps(row).encode() for row in rows) + newline * ended
    found, validation = index(content, step=step)
    if not prompts:
        assert [error.code for error in validation.errors] == ["empty_file"]
        return
    assert validation.errors == []
    assert validation.num_lines == len(prompts)
    for row, each in zip(rows, found, strict=True):
        text = content[each.offset : each.offset + each.length]
        assert json.loads(text) == row
        assert each.custom_id == row["custom_id"]
        sent = json.loads(offline_body(text, 3))
        assert sent == {**row["body"], "service_tier": "flex", "priority": 3}


MARK = b"\xef\xbb\xbf"
FIRST, SECOND = (json.dumps(line(name)).encode() for name in ("a", "b"))


@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.parametrize(
    "content",
    [
        MARK + FIRST + b"\n" + SECOND,
        MARK + b"\r\n" + FIRST + b"\r\n" + SECOND + b"\r\n",
        MARK + FIRST + b"\n" + MARK + SECOND + b"\n",
        FIRST + b"\r\n" + SECOND + b"\r\n\x1a",
        FIRST + b"\n" + SECOND + b"\x1a",
        b"\n \t\r\n" + FIRST + b"\n\n\n" + SECOND + b"\n\n",
        b"  " + FIRST + b"\n\t" + SECOND + b" \n",
    ],
)
def test_what_other_programs_write_around_lines_is_read_over(content: bytes, step: int) -> None:
    found, validation = index(content, step=step)
    assert validation.errors == []
    assert validation.num_lines == 2
    assert [content[one.offset : one.offset + one.length] for one in found] == [FIRST, SECOND]


@pytest.mark.parametrize("blank", [b" ", b"\n", MARK, MARK + b" "])
def test_what_is_read_over_costs_nothing(blank: bytes) -> None:
    """A line may have 16 MiB of it."""
    text = blank * (300_000 // len(blank))
    tracemalloc.start()
    try:
        assert num_lead_bytes(text) == len(text)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 10_000


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_another_encoding_is_named_once(encoding: str) -> None:
    (error,) = validate([numbered(3).decode().encode(encoding)], RULES).errors
    name = "UTF-32" if encoding == "utf-32" else "UTF-16"
    assert error.message == f"The file is {name}, as PowerShell writes it; save it as UTF-8."


@pytest.mark.anyio
@pytest.mark.parametrize("step", [1, 10_000])
@pytest.mark.parametrize("head", [b"", MARK, MARK + b"\r\n", b"\n \r\n"])
async def test_the_first_line_is_found_behind_what_is_read_over(head: bytes, step: int) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        content = head + FIRST + b"\n" + SECOND
        for start in range(0, len(content), step):
            yield content[start : start + step]

    assert await first_model(chunks(), 10_000) == MODEL


def test_whole_numbers_may_be_spelt_as_floats() -> None:
    body = {"max_tokens": 24.0, "n": 2.0, "max_completion_tokens": 30.0}
    found = validate([jsonl([line("a", body=body)])], RULES)
    assert found.errors == []
    plain = {"max_tokens": 24, "n": 2, "max_completion_tokens": 30}
    assert (
        found.estimated_tokens == validate([jsonl([line("a", body=plain)])], RULES).estimated_tokens
    )
    assert isinstance(found.estimated_tokens, int)


@given(st.binary(max_size=300), st.integers(1, 50))
def test_any_bytes_are_refused_without_a_crash(content: bytes, step: int) -> None:
    found, validation = index(content, step=step)
    assert found == []
    assert validation.errors


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"custom_id": ""}, "invalid_custom_id", "custom_id"),
        ({"custom_id": "x" * 513}, "invalid_custom_id", "custom_id"),
        ({"custom_id": "a\0b"}, "invalid_custom_id", "custom_id"),
        ({"custom_id": 7}, "invalid_request", "custom_id"),
        ({"method": "GET"}, "invalid_method", "method"),
        ({"url": "/v1/embeddings"}, "mismatched_url", "url"),
        ({"body": {"model": "other"}}, "model_not_found", "body.model"),
        ({"body": {"model": None}}, "invalid_request", "body.model"),
        ({"body": {"messages": None}}, "missing_required_parameter", "body.messages"),
        ({"body": {"stream": True}}, "stream_not_supported", "body.stream"),
        ({"body": {"stream": "true"}}, "stream_not_supported", "body.stream"),
        ({"body": {"background": True}}, "background_not_supported", "body.background"),
    ],
)
def test_a_bad_line_is_named(changes: dict[str, Any], code: str, param: str) -> None:
    bad = {**line("bad"), **changes}
    bad["body"] = {**line("bad")["body"], **changes.get("body", {})}
    content = jsonl([line("good"), bad])
    assert codes(content) == [(2, code, param)]


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": 101},
        {"max_tokens": 10**20},
        {"max_tokens": 0},
        {"max_completion_tokens": -1},
        {"max_output_tokens": "many"},
        {"n": 0},
        {"n": 10**30},
        {"n": 1.5},
        {"seed": 10**400},
    ],
)
def test_a_value_is_its_own_lines_affair(body: dict[str, Any]) -> None:
    """The engine's answer to it, good or bad, is that line's; the estimate stays one that fits."""
    found, validation = index(jsonl([line("good"), line("bad", body=body)]))
    assert [each.custom_id for each in found] == ["good", "bad"]
    assert validation.errors == []
    assert 0 < validation.estimated_tokens < 100 * MAX_N + 300


def test_estimates_fit_where_no_length_is_known() -> None:
    rows = [line(f"{n}", body={"max_tokens": 10**20, "n": 10**20}) for n in range(50)]
    estimate = validate([jsonl(rows)], Rules(endpoint=CHAT)).estimated_tokens
    assert 50 * MAX_N * MAX_OUTPUT_TOKENS < estimate < 2**63


@pytest.mark.parametrize("name", ["custom_id", "method", "url", "body"])
def test_a_missing_field_is_named(name: str) -> None:
    row = line("a")
    del row[name]
    assert codes(jsonl([row])) == [(1, "missing_required_parameter", name)]


def test_a_missing_model_is_named() -> None:
    row = line("a")
    del row["body"]["model"]
    assert codes(jsonl([row])) == [(1, "missing_required_parameter", "body.model")]


@pytest.mark.parametrize(
    "text",
    [
        b"[1, 2]",
        b'"text"',
        b"{",
        b'{"custom_id": "a", "body": {"x": "\xff"}}',
        b'{"custom_id": "a", "body": {"x": NaN}}',
        b'{"custom_id": "a", "body": ' + b"[" * 900 + b"]" * 900 + b"}",
    ],
)
def test_what_is_no_line_at_all_is_refused(text: bytes) -> None:
    ((number, code, _),) = codes(text)
    assert number == 1
    assert code in ("invalid_json_line", "invalid_request", "missing_required_parameter")


def test_lines_of_two_models_do_not_mix() -> None:
    rules = Rules(endpoint=CHAT, models={"a": ModelLimits(), "b": ModelLimits()})
    rows = [line("1", body={"model": "a"}), line("2", body={"model": "b"})]
    assert codes(jsonl(rows), rules) == [(2, "mismatched_model", "body.model")]
    assert validate([jsonl(rows[:1])], rules).model == "a"


def test_any_model_passes_where_the_server_names_none() -> None:
    assert codes(jsonl([line("1", body={"model": "whatever"})]), Rules(endpoint=CHAT)) == []


def test_a_long_line_is_skipped_and_the_next_is_found() -> None:
    content = jsonl([line("long", "x" * 3000), line("short")])
    found, validation = index(content)
    assert [(e.line, e.code) for e in validation.errors] == [(1, "line_too_long")]
    assert [each.custom_id for each in found] == ["short"]
    assert json.loads(content[found[0].offset :])["custom_id"] == "short"


def test_a_file_may_have_as_many_lines_as_the_limit() -> None:
    assert codes(numbered(50)) == []
    assert codes(numbered(51)) == [(51, "too_many_requests", None)]


def test_a_hundred_errors_are_enough() -> None:
    rules = Rules(endpoint=CHAT, max_lines=1000)
    validation = validate([b"{}\n" * 500], rules)
    assert [error.line for error in validation.errors] == list(range(1, 101))
    assert validation.num_lines == 100


def test_the_estimate_counts_what_is_asked_for() -> None:
    rules = Rules(endpoint=CHAT, default_output_tokens=10)
    short = validate([jsonl([line("a")])], rules).estimated_tokens
    for body in ({"max_tokens": 50, "n": 2}, {"max_tokens": 50.0, "n": 2.0, "stream": False}):
        more = validate([jsonl([line("a", body=body)])], rules).estimated_tokens
        assert more - short == 90


def test_body_of_keeps_numbers_as_they_are_spelt() -> None:
    text = b'{"custom_id":"a","body":{"model":"m","temperature":1.10,"big":123456789012345678901}}'
    assert bytes(body_of(text)["temperature"]) == b"1.10"
    assert b"123456789012345678901" in offline_body(text, 1)


def test_the_key_brings_shared_prefixes_together() -> None:
    dice = random.Random(0)
    heads = [f"head {n} " * 200 for n in range(8)]
    prompts = [(head, f"{head}{dice.random()}") for head in heads for _ in range(20)]
    dice.shuffle(prompts)
    ordered = [head for head, _ in sorted(prompts, key=lambda pair: prefix_key(pair[1].encode()))]
    changes = sum(a != b for a, b in pairwise(ordered))
    assert changes == len(heads) - 1
    shuffled = [head for head, _ in prompts]
    assert sum(a != b for a, b in pairwise(shuffled)) > 100


def test_the_key_of_a_prompt_is_its_own() -> None:
    assert prefix_key(b"") == prefix_key(memoryview(b""))
    assert len(prefix_key(b"x" * 50_000)) == 40
    assert prefix_key(b"a" * 300) != prefix_key(b"a" * 301)
    assert prefix_key(b"a" * 300)[:10] == prefix_key(b"a" * 301)[:10]
