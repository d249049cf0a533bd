"""A real Prometheus scrapes the real server: dashboard and alerts find all they ask for."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import yaml

from conserve.bench.ports import free_port
from tests.deploy.deployed import RULES, SCRAPE, Expression, dashboard_expressions, rule_expressions
from tests.waiting import eventually

pytestmark = pytest.mark.server

MODEL = "SmolLM2-135M-Instruct"


class Prometheus:
    """A running Prometheus, asked over its HTTP API."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def get(self, path: str, **parameters: str) -> Any:
        answer = self._client.get(f"/api/v1{path}", params=parameters).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, text: str) -> list[Any]:
        found: list[Any] = self.get("/query", query=text)["result"]
        return found

    def await_any(self, text: str) -> None:
        eventually(lambda: bool(self.query(text)))

    def problems(self, expression: Expression) -> list[str]:
        """What the expression asks for and the server does not have."""
        found: list[str] = []
        labels: set[str] = set()
        for selector in expression.selectors:
            series = self.get("/series", **{"match[]": selector})
            if not series:
                found.append(f"{expression.where}: nothing is {selector}")
            labels.update(*series)
        missing = expression.labels - labels
        return found + [f"{expression.where}: no label {label}" for label in sorted(missing)]


@contextmanager
def running(program: str, folder: Path, server_url: str, rules: str) -> Iterator[Prometheus]:
    """On the shipped configuration, but for the address, the pace and the rules."""
    config = yaml.safe_load(SCRAPE.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": [urlsplit(server_url).netloc]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / RULES.name).write_text(rules)
    url = f"127.0.0.1:{free_port()}"
    words = [program, f"--config.file={folder}/prometheus.yml", f"--web.listen-address={url}"]
    words += [f"--storage.tsdb.path={folder}/data", "--log.level=warn"]
    process = subprocess.Popen(words, cwd=folder, start_new_session=True)
    try:
        eventually(lambda: process.poll() is not None or answers(f"http://{url}/-/ready"))
        assert process.poll() is None
        with httpx.Client(base_url=f"http://{url}", timeout=30) as client:
            yield Prometheus(client)
    finally:
        process.terminate()
        process.wait(30)


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


def impatient(rules: str) -> str:
    """The same alerts, without the wait; and one more, that every first token sets off."""
    content = yaml.safe_load(rules)
    found = content["groups"][0]["rules"]
    for rule in found:
        rule.pop("for")
    late = next(rule for rule in found if rule["alert"] == "ConServeFirstTokensLate")
    always = late["expr"].replace("(conserve:ttft_target", "(0 * conserve:ttft_target")
    found.append(late | {"alert": "AnyFirstToken", "expr": always})
    return str(yaml.safe_dump(content))


@pytest.fixture(scope="module")
def watched(
    prometheus: str, server: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """Prometheus, when it has seen online requests, offline ones and a batch."""
    folder = tmp_path_factory.mktemp("prometheus")
    rules = impatient(RULES.read_text())
    with running(prometheus, folder, server.url, rules) as found:
        found.await_any("up == 1")
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            work(client)
        for name in ("ttft_seconds_count", "tbt_seconds_count", "computed_tokens_total"):
            for label in ("online", "offline"):
                found.await_any(f'increase(conserve:{name}{{class="{label}"}}[1m]) > 0')
        found.await_any("increase(conserve:batch_lines_total[1m]) > 0")
        yield found


def work(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": MODEL, "max_tokens": 8}
    body |= {"messages": [{"role": "user", "content": "Name three colours."}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    file = client.files.create(file=("a.jsonl", json.dumps(line).encode()), purpose="batch")
    hour: Any = "1h"  # OpenAI's own client knows of no window but a day
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window=hour
    )
    client.chat.completions.create(**body)
    eventually(lambda: client.batches.retrieve(batch.id).status == "completed")


@pytest.mark.parametrize("each", dashboard_expressions(), ids=lambda each: each.where)
def test_a_panel_has_what_it_asks_for(watched: Prometheus, each: Expression) -> None:
    assert watched.problems(each) == []
    assert watched.query(each.text), "nothing to draw"


@pytest.mark.parametrize("each", rule_expressions(), ids=lambda each: each.where)
def test_an_alert_has_what_it_asks_for(watched: Prometheus, each: Expression) -> None:
    assert watched.problems(each) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rate(conserve:step_total[1m])", "nothing is conserve:step_total"),
        ('conserve:waiting_requests{class="batch"} > 0', "nothing is conserve:waiting_requests"),
        ("sum by (tier) (conserve:waiting_requests)", "no label tier"),
    ],
)
def test_a_wrong_name_is_caught(watched: Prometheus, text: str, problem: str) -> None:
    """The negative control: Prometheus itself takes such rules without a word."""
    (found,) = watched.problems(Expression("an alert", text))
    assert problem in found
    assert watched.query(text) == [] or "tier" in text


def test_alerts_are_evaluated_and_go_off(watched: Prometheus) -> None:
    def states() -> dict[str, str]:
        (group,) = watched.get("/rules")["groups"]
        assert all(rule["health"] in ("ok", "unknown") for rule in group["rules"])
        return {rule["name"]: rule["state"] for rule in group["rules"]}

    eventually(lambda: states()["AnyFirstToken"] == "firing")
    found = states()
    assert found["ConServeDown"] == "inactive"
    assert found["ConServeBatchesStalled"] == "inactive"
    assert found["ConServeBatchWillMissDeadline"] == "inactive"
    assert set(found) == {each.where for each in rule_expressions()} | {"AnyFirstToken"}


def test_targets_are_exported(watched: Prometheus) -> None:
    """Which they are is the machine's to say."""
    for name in ("ttft", "tbt"):
        (found,) = watched.query(f"conserve:{name}_target_seconds")
        target = float(found["value"][1])
        bound = f'conserve:{name}_seconds_bucket{{class="online", le="{target}"}}'
        assert watched.query(bound) or target > 30, "the histogram has a bound at the target"
