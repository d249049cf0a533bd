"""The alerts: Prometheus takes them, they go off when they should, and every one is explained."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.deployed import ROOT, RULES, SCRAPE, alerts, documented, rule_expressions

UNIT_TESTS = Path(__file__).with_name("conserve.rules.test.yml")


def run_unit_tests(promtool: str, folder: Path, rules: str) -> subprocess.CompletedProcess[str]:
    (folder / RULES.name).write_text(rules)
    (folder / UNIT_TESTS.name).write_text(UNIT_TESTS.read_text())
    words = [promtool, "test", "rules", UNIT_TESTS.name]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)


def test_prometheus_takes_the_configuration(promtool: str) -> None:
    """The rules it names included."""
    subprocess.run([promtool, "check", "config", str(SCRAPE)], check=True)


def test_alerts_go_off_when_they_should(promtool: str, tmp_path: Path) -> None:
    done = run_unit_tests(promtool, tmp_path, RULES.read_text())
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("alert", [rule["alert"] for rule in alerts()])
def test_an_alert_on_another_metric_is_caught(promtool: str, tmp_path: Path, alert: str) -> None:
    """The negative control, alert by alert: its unit test fails once it reads a wrong name."""
    content = yaml.safe_load(RULES.read_text())
    for rule in content["groups"][0]["rules"]:
        if rule["alert"] == alert:
            rule["expr"] = rule["expr"].replace("conserve:", "conserved:").replace("up{", "upp{")
    done = run_unit_tests(promtool, tmp_path, yaml.safe_dump(content))
    assert done.returncode == 1
    assert alert in done.stderr


def test_every_alert_is_explained() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    for rule in alerts():
        assert f"\n### {rule['alert']}\n" in page
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_alerts_read_documented_metrics() -> None:
    for expression in rule_expressions():
        assert expression.names
        assert expression.names <= documented() | {"up"}, expression.where
