"""Every exported series is documented as it is exported, and no other is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from prometheus_client import Counter

from conserve.engine.stats import METRICS

pytestmark = pytest.mark.engine

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `conserve:(\w+)` \| (\w+) \| (?:`(\w+)`)? ?\| (.+) \|$", re.MULTILINE)


def test_the_page_lists_what_is_exported() -> None:
    listed = {
        (name, kind, label, text) for name, kind, label, text in ROW.findall(PAGE.read_text())
    }
    exported = {
        (
            metric.name + ("_total" if metric.kind is Counter else ""),
            metric.kind.__name__.lower(),
            metric.label,
            metric.help,
        )
        for metric in METRICS
    }
    assert listed == exported
