"""Every exported series is documented as it is exported, and no other is."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import Counter

from conserve.engine.series import LABEL_VALUES, METRICS
from conserve.server.batches.metrics import SERIES

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `conserve:(\w+)` \| (\w+) \| (?:`(\w+)`)? ?\| (.+) \|$", re.MULTILINE)

BATCH_ROW = re.compile(
    r"^\| `conserve:(batch\w+)` \| (\w+) \| (?:`(\w+)`)? ?\| ([^|]*) \| (.+) \|$", re.MULTILINE
)


def test_the_page_lists_what_is_exported() -> None:
    listed = {
        (name, kind, label, text)
        for name, kind, label, text in ROW.findall(PAGE.read_text())
        if not name.startswith("batch")
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


def test_the_page_lists_the_batch_series() -> None:
    listed = {
        (name, kind, label, tuple(re.findall(r"`(\w+)`", values)), text)
        for name, kind, label, values, text in BATCH_ROW.findall(PAGE.read_text())
    }
    exported = {
        (
            series.name + ("_total" if series.kind is Counter else ""),
            series.kind.__name__.lower(),
            series.label,
            series.values,
            series.help,
        )
        for series in SERIES
    }
    assert listed == exported


def test_the_page_lists_what_labels_can_be() -> None:
    page = PAGE.read_text()
    for label, values in LABEL_VALUES.items():
        assert [value for value in (label, *values) if value and f"`{value}`" not in page] == []
