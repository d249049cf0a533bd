"""The pods that the chart makes: what they run, where their data lies, how they end, when there
are more of them."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from conserve.batch.settings import BatchSettings
from tests.deploy.chart import EXAMPLES, NAME, NAMESPACE, rendered
from tests.deploy.deployed import ROOT, Expression, documented

DATABASE = {"secrets__database__name": "db"}
PREFIX = str(BatchSettings.model_config["env_prefix"])


def pod(example: str, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = rendered(example, **changes)["Deployment"]["spec"]["template"]["spec"]
    return found


def container(example: str, **changes: Any) -> dict[str, Any]:
    (found,) = pod(example, **changes)["containers"]
    return dict(found)


def environment(example: str, **changes: Any) -> dict[str, Any]:
    """Values by name; of one that comes from a Secret, where it is."""
    listed = container(example, **changes)["env"]
    return {each["name"]: each.get("value") or each["valueFrom"] for each in listed}


def mounted(example: str, **changes: Any) -> dict[str, str]:
    """What is behind each folder: the kind of volume."""
    spec = pod(example, **changes)
    kinds = {v["name"]: next(kind for kind in v if kind != "name") for v in spec["volumes"]}
    mounts = spec["containers"][0]["volumeMounts"]
    return {each["mountPath"]: kinds[each["name"]] for each in mounts}


def flags(example: str, **changes: Any) -> list[str]:
    return list(container(example, **changes)["args"])


def test_every_flag_is_documented() -> None:
    page = (ROOT / "docs" / "serving.md").read_text()
    vllms = {"--port", "--api-server-count", "--shutdown-timeout", "--max-model-len"}
    for flag in [*flags("gpu"), *flags("gpu", batches__enabled=False)]:
        name = flag.partition("=")[0]
        assert not flag.startswith("--") or name in vllms or f"| `{name}` |" in page


def test_flags_say_what_the_values_say() -> None:
    given = flags(
        "gpu", server__sloTtftMs=500.5, server__chatSlowdown=1.3, server__apiServerCount=2
    )
    assert {"--slo-ttft-ms=500.5", "--chat-slowdown=1.3", "--api-server-count=2"} <= set(given)
    assert given[0] == "Qwen/Qwen3-8B"
    assert given[-2:] == ["--max-model-len", "16384"]
    assert "--no-batches" not in given
    assert "--no-batches" in flags("gpu", batches__enabled=False)
    assert flags("cpu")[0] == "--port=8000", "the default model has no name"


def test_every_setting_of_batches_exists() -> None:
    names = set(environment("fleet")) | set(environment("gpu"))
    ours = {name.removeprefix(PREFIX).lower() for name in names if name.startswith(PREFIX)}
    assert ours == {"data_dir", "database_url", "files_url"}
    assert ours <= set(BatchSettings.model_fields)


def test_secrets_are_named_and_not_told() -> None:
    found = environment("fleet")
    assert found[f"{PREFIX}DATABASE_URL"] == {
        "secretKeyRef": {"name": "conserve-database", "key": "url"}
    }
    assert found["VLLM_API_KEY"] == {"secretKeyRef": {"name": "conserve-keys", "key": "api-key"}}
    assert "HF_TOKEN" not in found


@pytest.mark.parametrize(
    ("changes", "data", "files", "url"),
    [
        ({}, "persistentVolumeClaim", None, None),
        ({"storage__claim__enabled": False}, "emptyDir", None, None),
        (DATABASE, "emptyDir", "persistentVolumeClaim", "file:///files"),
        ({**DATABASE, "storage__filesUrl": "s3://b/f"}, "emptyDir", None, "s3://b/f"),
        ({"batches__enabled": False}, None, None, None),
    ],
)
def test_files_and_batches_lie_where_they_outlive_pods(
    changes: dict[str, Any], data: str | None, files: str | None, url: str | None
) -> None:
    """With a database each pod has a data folder of its own: locks of workers are in it."""
    found = mounted("gpu", **changes)
    assert (found.get("/data"), found.get("/files")) == (data, files)
    assert environment("gpu", **changes).get(f"{PREFIX}FILES_URL") == url


@pytest.mark.parametrize("seconds", [0, 10])
def test_what_has_begun_may_end_in_the_grace_period(seconds: int) -> None:
    values = {"shutdown__endpointsSeconds": seconds, "shutdown__requestsSeconds": 45}
    spec = pod("gpu", **values)
    (server,) = spec["containers"]
    assert "--shutdown-timeout=45" in server["args"]
    assert spec["terminationGracePeriodSeconds"] == seconds + 45 + 30
    waits = server.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
    assert waits == (["sleep", "10"] if seconds else None)


def test_probes_ask_what_answers_503_from_the_signal_on() -> None:
    """That it does is tests/server/test_draining.py's."""
    server = container("gpu", startupMinutes=20)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"]["path"] == "/health"
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 20 * 60


@pytest.mark.parametrize("example", [path.stem for path in EXAMPLES])
def test_a_server_may_do_no_more_than_it_must(example: str) -> None:
    """What Kubernetes calls the restricted standard of pods, and no token."""
    spec = pod(example)
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (server,) = spec["containers"]
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    folders = {each["mountPath"] for each in server["volumeMounts"]}
    assert {"/tmp", "/dev/shm", environment(example)["HOME"]} <= folders


def test_gpus_are_asked_for() -> None:
    limits = container("gpu", gpus=2)["resources"]["limits"]
    assert limits == {"memory": "64Gi", "nvidia.com/gpu": 2}
    assert "nvidia.com/gpu" not in container("cpu")["resources"]["limits"]


def test_a_claim_outlives_the_release() -> None:
    claim = rendered("gpu")["PersistentVolumeClaim"]
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    made = rendered("gpu", modelCache__claim__enabled=False, storage__claim__existing="old")
    assert "PersistentVolumeClaim" not in made


def test_replicas_are_the_autoscalers_where_there_is_one() -> None:
    assert "replicas" not in rendered("fleet")["Deployment"]["spec"]
    assert rendered("gpu")["Deployment"]["spec"]["replicas"] == 1


def triggers(**changes: Any) -> dict[str, dict[str, str]]:
    spec = rendered("fleet", **changes)["ScaledObject"]["spec"]
    assert spec["scaleTargetRef"]["name"] == NAME
    return {each["name"]: each["metadata"] for each in spec["triggers"]}


def test_it_scales_by_documented_metrics() -> None:
    for name, trigger in triggers().items():
        found = Expression(name, trigger["query"]).names
        assert found
        assert found <= documented()


def test_a_replica_has_a_worker_for_each_api_process() -> None:
    assert triggers(server__apiServerCount=3)["deadlines"]["threshold"] == "3"
    assert triggers()["chats"]["threshold"] == "32"
    assert triggers(autoscaling__chatsPerReplica=0).keys() == {"deadlines"}
    assert triggers(batches__enabled=False).keys() == {"chats"}


OURS = f'namespace="{NAMESPACE}",service="{NAME}"'
SERIES = [
    *((f'conserve:batch_workers_needed{{{OURS},pod="{pod}"}}', "3x9") for pod in "ab"),
    (f'conserve:batch_workers_needed{{namespace="{NAMESPACE}",service="other"}}', "90x9"),
    *((f'conserve:running_requests{{{OURS},class="online",pod="{pod}"}}', "20x9") for pod in "ab"),
    (f'conserve:running_requests{{{OURS},class="offline",pod="a"}}', "500x9"),
    (f'conserve:waiting_requests{{{OURS},class="online",pod="a"}}', "2x9"),
]


def asks_for(promtool: str, folder: Path, value: float, query: str) -> bool:
    """Whether the query is worth so much where two replicas are, as a real Prometheus has it."""
    test = {
        "interval": "1m",
        "input_series": [{"series": series, "values": values} for series, values in SERIES],
        "promql_expr_test": [
            {"expr": query, "eval_time": "5m", "exp_samples": [{"labels": "{}", "value": value}]}
        ],
    }
    (folder / "test.yml").write_text(yaml.safe_dump({"tests": [test]}))
    words = [promtool, "test", "rules", "test.yml"]
    return subprocess.run(words, cwd=folder, capture_output=True, check=False).returncode == 0


def test_it_asks_for_what_deadlines_and_chats_need(promtool: str, tmp_path: Path) -> None:
    """Offline work that waits is not in it, nor another release's."""
    found = triggers(autoscaling__headroom=1.25)
    assert asks_for(promtool, tmp_path, 3.75, found["deadlines"]["query"])
    assert asks_for(promtool, tmp_path, 42, found["chats"]["query"])
    assert not asks_for(
        promtool, tmp_path, 42, re.sub("online", "offline", found["chats"]["query"])
    )


def test_more_labels_narrow_both() -> None:
    for trigger in triggers(autoscaling__labels={"cluster": "east"}).values():
        assert trigger["query"].count(json.dumps("east")) == trigger["query"].count("conserve:")
