"""The Helm chart: what it makes is what Kubernetes takes, and what cannot work is refused."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.deploy import custom_resources
from tests.deploy.chart import CHART, EXAMPLES, NAME, Manifest, refused, rendered, run
from tests.deploy.deployed import DASHBOARD, RULES

VERSIONS = ("1.27", "1.37")
"""The oldest that the chart takes, and the newest that there is a schema of."""


def validate(manifest: Manifest, version: str) -> None:
    """By the published schema of its kind, in which an unknown field is an error. Raises
    jsonschema.ValidationError."""
    if manifest["kind"] in custom_resources.SCHEMAS:
        custom_resources.validate(manifest)
    else:
        published = pytest.importorskip("kubernetes_validate")
        published.validate(manifest, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("example", [path.stem for path in EXAMPLES])
def test_kubernetes_takes_the_examples(example: str, version: str) -> None:
    made = rendered(example)
    assert {"Deployment", "Service", "ServiceAccount", "PodDisruptionBudget"} <= made.keys()
    for manifest in made.values():
        validate(manifest, version)


def test_the_fleet_has_all_there_is() -> None:
    made = rendered("fleet")
    assert made.keys() >= {"ServiceMonitor", "PrometheusRule", "ConfigMap", "ScaledObject"}


@pytest.mark.parametrize(
    "kind",
    ["Deployment", "PodDisruptionBudget", "ServiceMonitor", "PrometheusRule", "ScaledObject"],
)
def test_a_wrong_field_is_seen(kind: str) -> None:
    """The negative control of the schemas."""
    manifest = rendered("fleet")[kind]
    manifest["spec"]["replicaz"] = 1
    with pytest.raises(jsonschema.ValidationError, match="replicaz"):
        validate(manifest, VERSIONS[-1])


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_helm_finds_no_fault(example: Path) -> None:
    done = run("lint", "--strict", CHART, "--values", example)
    assert done.returncode == 0, done.stdout


def test_alerts_and_dashboard_are_those_of_prometheus_and_grafana() -> None:
    made = rendered("fleet")
    assert made["PrometheusRule"]["spec"] == yaml.safe_load(RULES.read_text())
    assert json.loads(made["ConfigMap"]["data"]["conserve.json"]) == json.loads(
        DASHBOARD.read_text()
    )


def test_a_package_of_the_chart_has_them_in_it(tmp_path: Path) -> None:
    """In the repository they are links to the one source."""
    done = run("package", CHART, "--destination", tmp_path)
    assert done.returncode == 0, done.stderr
    (package,) = tmp_path.iterdir()
    with tarfile.open(package) as archive:
        for source in (RULES, DASHBOARD):
            content = archive.extractfile(f"conserve/files/{source.name}")
            assert content is not None
            assert content.read() == source.read_bytes()


def test_the_monitor_names_the_job_as_the_alerts_have_it() -> None:
    made = rendered("fleet")
    label = made["ServiceMonitor"]["spec"]["jobLabel"]
    assert made["Service"]["metadata"]["labels"][label] == "conserve"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"replcas": 2}, "replcas"),
        ({"replicas": -1}, "/replicas"),
        ({"server__chatSlowdown": "fast"}, "'gentle', 'balanced', 'greedy'"),
        ({"server__sloTtftMs": 0}, "/server/sloTtftMs"),
        ({"server__offlineFloor": 1}, "/server/offlineFloor"),
        ({"server__extraArgs": ["--max-model-len", 8192]}, "/server/extraArgs/1"),
        ({"sharedMemory": "plenty"}, "/sharedMemory"),
        ({"storage__claim__accessMode": "RWX"}, "/storage/claim/accessMode"),
        ({"storage__filesUrl": "bucket/folder"}, "/storage/filesUrl"),
        ({"security__userId": 0}, "/security/userId"),
        ({"autoscaling__minReplicas": 0}, "/autoscaling/minReplicas"),
        ({"autoscaling__headroom": 1}, "/autoscaling/headroom"),
        ({"image__repository": ""}, "image.repository: name the image"),
        ({"image__repository": "conserve@sha256:0"}, "/image/repository"),
        ({"update": {"maxSurge": 0, "maxUnavailable": "0%"}}, "update.maxUnavailable: with"),
        ({"autoscaling__scaleDownAfterSeconds": 0}, "/autoscaling/scaleDownAfterSeconds"),
        ({"autoscaling__pollingSeconds": 1801}, "/autoscaling/pollingSeconds"),
        ({"autoscaling__labels": {"east-1": "a"}}, "/autoscaling/labels"),
        ({"replicas": 2}, "secrets.database.name: several replicas"),
        ({"secrets__database__name": "db", "storage__claim__enabled": False}, "storage.filesUrl"),
        ({"replicas": 2, "secrets__database__name": "db"}, "storage.claim.accessMode: several"),
        ({"replicas": 2, "batches__enabled": False}, "modelCache.claim.accessMode"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    assert words in refused("gpu", **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"autoscaling__prometheusUrl": ""}, "autoscaling.prometheusUrl: name"),
        ({"autoscaling__minReplicas": 9}, "autoscaling.minReplicas: 9 is above"),
        (
            {"batches__enabled": False, "autoscaling__chatsPerReplica": 0},
            "autoscaling.chatsPerReplica: without batches",
        ),
    ],
)
def test_so_is_a_fleet_that_cannot_scale(changes: dict[str, Any], words: str) -> None:
    assert words in refused("fleet", **changes)


def test_the_values_as_they_come_want_an_image() -> None:
    assert "image.repository: name the image" in refused(None)


NUMBERS_ARE = {"key": "1", "name": "2"}
ODD: dict[str, Any] = {
    "security__userId": 1_000_660_000,
    "security__groupId": 1_000_660_000,
    "replicas": 1_000_000,
    "shutdown__requestsSeconds": 1_000_000,
    "secrets": dict.fromkeys(("apiKey", "database", "huggingFace"), NUMBERS_ARE),
    "image__pullSecrets": ["3"],
    "serviceAccount__name": "4",
    "storage__claim": {"enabled": True, "storageClass": "5", "accessMode": "ReadWriteMany"},
    "modelCache__claim": {"enabled": True, "existing": "6"},
}
"""Numbers as OpenShift gives them to users, and names that YAML would take for numbers."""


@pytest.mark.parametrize("release", ["prod", "on", "7b", "123", "chat.v1", "null"])
@pytest.mark.parametrize("changes", [{}, ODD], ids=["plain", "odd"])
def test_kubernetes_takes_odd_names_and_large_numbers(
    release: str, changes: dict[str, Any]
) -> None:
    made = rendered("gpu", release=release, namespace="42", **changes)
    for manifest in made.values():
        validate(manifest, VERSIONS[-1])
        assert not list(floats(manifest))
        metadata = manifest["metadata"]
        assert (metadata["namespace"], instance(metadata)) == ("42", release)
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", made["Service"]["metadata"]["name"])


def instance(metadata: Manifest) -> str:
    return str(metadata["labels"]["app.kubernetes.io/instance"])


def floats(value: Any) -> Iterator[float]:
    """1.00066e+09 is one, which Kubernetes takes for no whole number."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from floats(each)


def test_large_numbers_are_whole_in_flags() -> None:
    flags = rendered("gpu", **ODD)["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    assert "--shutdown-timeout=1000000" in flags["args"]


def test_an_image_is_named_by_tag_or_digest() -> None:
    for tag, image in (("gpu", "conserve:gpu"), ("sha256:0a", "conserve@sha256:0a")):
        spec = rendered("gpu", image__tag=tag)["Deployment"]["spec"]["template"]["spec"]
        assert spec["containers"][0]["image"] == image


def names(values: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Of every value, dotted."""
    for name, value in values.items():
        yield f"{before}{name}"
        if isinstance(value, dict):
            yield from names(value, f"{before}{name}.")


def allowed(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[str]:
    for name, of in schema.get("properties", {}).items():
        found = definitions[of["$ref"].rsplit("/", 1)[1]] if "$ref" in of else of
        yield name
        yield from (f"{name}.{below}" for below in allowed(found, definitions))


def test_every_value_has_a_default_and_a_rule() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    given = set(names(values)) - {"monitoring.dashboard.labels.grafana_dashboard"}
    free = {name for name in given if name.startswith(("resources.requests.", "resources.limits."))}
    ours = set(allowed(schema, schema["definitions"])) - {"global"}
    assert given - free == ours


def test_deployments_are_called_after_the_chart() -> None:
    assert NAME in rendered("gpu")["Deployment"]["metadata"]["name"]
