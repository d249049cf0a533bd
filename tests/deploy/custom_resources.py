"""The fields of other projects' resources that the chart may use.

Their published schemas come with no package. What we write has been held against them once (KEDA
and the Prometheus operator of August 2026); a field beyond these is to be, before it is added here.
"""

from __future__ import annotations

from typing import Any

import jsonschema

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
WORDS: Schema = {"type": "object", "additionalProperties": TEXT}
COUNT: Schema = {"type": "integer", "minimum": 0}


def fields(*required: str, **known: Schema) -> Schema:
    """An object of these fields and no others."""
    return {
        "type": "object",
        "properties": known,
        "required": list(required),
        "additionalProperties": False,
    }


def several(of: Schema) -> Schema:
    return {"type": "array", "items": of, "minItems": 1}


METADATA = fields("name", "namespace", name=TEXT, namespace=TEXT, labels=WORDS)


def resource(version: str, kind: str, spec: Schema) -> Schema:
    return fields(
        "apiVersion",
        "kind",
        "metadata",
        "spec",
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=METADATA,
        spec=spec,
    )


MONITOR = fields(
    "selector",
    "endpoints",
    jobLabel=TEXT,
    selector=fields(matchLabels=WORDS),
    endpoints=several(
        fields(port=TEXT, path=TEXT, interval={"type": "string", "pattern": "^[0-9]+s$"})
    ),
)
RULE = fields("expr", alert=TEXT, expr=TEXT, annotations=WORDS, labels=WORDS, **{"for": TEXT})
RULES = fields(groups=several(fields("name", name=TEXT, rules=several(RULE))))
POLICY = fields(
    "type",
    "value",
    "periodSeconds",
    type={"enum": ["Pods", "Percent"]},
    value={"type": "integer", "minimum": 1},
    periodSeconds={"type": "integer", "minimum": 1, "maximum": 1800},
)
BEHAVIOR = fields(
    stabilizationWindowSeconds={"type": "integer", "minimum": 0, "maximum": 3600},
    policies=several(POLICY),
)
TRIGGER = fields(
    "type",
    "metadata",
    type={"const": "prometheus"},
    name=TEXT,
    metricType={"enum": ["AverageValue", "Value"]},
    metadata=fields(
        "serverAddress",
        "query",
        "threshold",
        serverAddress=TEXT,
        query=TEXT,
        threshold={"type": "string", "pattern": r"^[0-9.]+$"},
        ignoreNullValues={"enum": ["true", "false"]},
    ),
)
SCALED_OBJECT = fields(
    "scaleTargetRef",
    "triggers",
    scaleTargetRef=fields("name", name=TEXT),
    minReplicaCount=COUNT,
    maxReplicaCount=COUNT,
    pollingInterval=COUNT,
    advanced=fields(
        horizontalPodAutoscalerConfig=fields(behavior=fields(scaleUp=BEHAVIOR, scaleDown=BEHAVIOR))
    ),
    triggers=several(TRIGGER),
)

SCHEMAS = {
    "ServiceMonitor": resource("monitoring.coreos.com/v1", "ServiceMonitor", MONITOR),
    "PrometheusRule": resource("monitoring.coreos.com/v1", "PrometheusRule", RULES),
    "ScaledObject": resource("keda.sh/v1alpha1", "ScaledObject", SCALED_OBJECT),
}


def validate(manifest: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError."""
    jsonschema.validate(manifest, SCHEMAS[manifest["kind"]])
