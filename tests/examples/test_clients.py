"""Clients of other projects: what they ask for is what the server counts."""

from __future__ import annotations

import re

import pytest

from tests.conftest import Server
from tests.examples.conftest import RunExample, counted

pytestmark = pytest.mark.server


def test_openai(server: Server, example: RunExample) -> None:
    with counted(server, online=1, offline=4):
        lines = example("chat_and_flex.py").splitlines()
    assert [line.partition(":")[0] for line in lines if ": " in line].count("flex") == 4
    assert lines[0].startswith("default: ")


def test_langchain(server: Server, example: RunExample) -> None:
    with counted(server, online=1, offline=6):
        told = example("langchain_bulk.py")
    assert len(re.findall(r"^flex: ", told, re.MULTILINE)) == 6
    assert len(re.findall(r"^default: ", told, re.MULTILINE)) == 1


def test_lm_eval(server: Server, example: RunExample) -> None:
    """Two answers of six words to compare, and six to generate."""
    with counted(server, online=0, offline=18):
        told = example("lm_eval_flex.py")
    assert re.search(r"^opposites_choice: acc [01]\.\d\d$", told, re.MULTILINE)
    assert re.search(r"^opposites_open: exact_match [01]\.\d\d$", told, re.MULTILINE)
    assert "12 questions asked" in told


def test_bench_serve(server: Server, example: RunExample) -> None:
    with counted(server, online=0, offline=8):
        told = example("bench_serve_flex.py", "--num-prompts", "8")
    assert re.search(r"^Successful requests: +8 *$", told, re.MULTILINE)
    assert re.search(r"^harvested \d+ tokens/s with flex$", told, re.MULTILINE)


def test_ray(server: Server, example: RunExample) -> None:
    with counted(server, online=0, offline=8):
        told = example("ray_map.py")
    assert len(re.findall(r"^Report \d: all is well\. -> .+$", told, re.MULTILINE)) == 8
    assert "8 rows" in told
