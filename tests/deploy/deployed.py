"""What is shipped for Grafana and Prometheus, read; and what its expressions ask for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "conserve.rules.yml"
SCRAPE = ROOT / "deploy" / "prometheus" / "prometheus.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "conserve.json"

VARIABLES = {"$job": ".*", "$instance": ".*", "$__rate_interval": "1m"}
SELECTOR = re.compile(r"((?:[a-z]+:[a-z0-9_]+)|\bup\b)(\{[^}]*\})?")
GROUPING = re.compile(r"\b(?:by|on) \(([^)]*)\)")
LEGEND = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True)
class Expression:
    """PromQL, and where it stands."""

    where: str
    text: str
    legend: str = ""

    @property
    def selectors(self) -> list[str]:
        return [name + labels for name, labels in SELECTOR.findall(self.text)]

    @property
    def names(self) -> set[str]:
        return {name for name, _ in SELECTOR.findall(self.text)}

    @property
    def labels(self) -> set[str]:
        """That it groups or matches by."""
        lists = GROUPING.findall(self.text)
        return {label.strip() for words in lists for label in words.split(",")}


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    return list(group["rules"])


def rule_expressions() -> list[Expression]:
    return [Expression(rule["alert"], rule["expr"]) for rule in alerts()]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def dashboard_expressions() -> list[Expression]:
    return list(_expressions(dashboard()))


def _expressions(board: dict[str, Any]) -> Iterator[Expression]:
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            text = target["expr"]
            for name, value in VARIABLES.items():
                text = text.replace(name, value)
            yield Expression(panel["title"], text, target["legendFormat"])


def documented() -> set[str]:
    """Samples of the series that docs/metrics.md lists."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    found = set()
    for name, kind in re.findall(r"^\| `(conserve:\w+)` \| (\w+) \|", page, re.MULTILINE):
        ends = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        found |= {name + end for end in ends}
    return found
