"""Several API processes: /metrics sums what they counted, and shows the newest of what they set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

pytestmark = pytest.mark.engine

SCRIPT = """
import json, os
from types import SimpleNamespace
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, multiprocess
from conserve.engine.connector import ConserveConnector

TARGETS = {"conserve": {"slo_ttft_s": 0.7}}
CONFIG = SimpleNamespace(kv_transfer_config=None, additional_config=TARGETS)
KINDS = {kind: kind for kind in (Counter, Gauge, Histogram)}

def api_process(tokens, running):
    if os.fork() == 0:
        names, values = ["model_name", "engine"], {0: ["smol", "0"]}
        export = ConserveConnector.build_prom_metrics(CONFIG, KINDS, names, values)
        export.observe({
            "output_tokens": {"online": tokens},
            "ttft_seconds": {"online": [0.5] * tokens},
            "running_requests": {"online": running},
        })
        os._exit(0)
    assert os.wait()[1] == 0

api_process(3, 7)
api_process(4, 2)
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(json.dumps([
    (sample.name, sample.labels, sample.value)
    for family in registry.collect() for sample in family.samples
]))
"""


def test_processes_together(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    samples = json.loads(done.stdout.splitlines()[-1])

    def value(name: str, **labels: str) -> Any:
        labels |= {"model_name": "smol", "engine": "0"}
        (found,) = [v for n, own, v in samples if n == f"conserve:{name}" and own == labels]
        return found

    labels = {"class": "online"}
    assert value("output_tokens_total", **labels) == 7
    assert value("ttft_seconds_count", **labels) == 7
    assert value("running_requests", **labels) == 2
    assert value("ttft_target_seconds") == 0.7
    assert value("steps_total", mode="offline") == 0
