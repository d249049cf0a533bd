"""schemathesis: our routes keep to their own description under generated requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.batch.batch_server import server


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server(tmp_path_factory.mktemp("schema")) as one:
        assert one.wait()
        with one.client as client:
            yield str(client.base_url).removesuffix("/v1/")


def test_every_route_answers_generated_requests_as_described(url: str) -> None:
    described = httpx.get(f"{url}/openapi.json").json()
    ours = ("/v1/files", "/v1/batches", "/v1/usage")
    described["paths"] = {
        path: item for path, item in described["paths"].items() if path.startswith(ours)
    }
    schema = schemathesis.openapi.from_dict(described)
    names = set()
    for operation in schema.get_all_operations():
        assert isinstance(operation, Ok)
        one = operation.ok()
        names.add(f"{one.method.upper()} {one.path}")
        check_operation(one, url)
    assert names == {
        "POST /v1/files",
        "GET /v1/files",
        "GET /v1/files/{file_id}",
        "DELETE /v1/files/{file_id}",
        "GET /v1/files/{file_id}/content",
        "POST /v1/batches",
        "GET /v1/batches",
        "GET /v1/usage",
        "GET /v1/batches/{batch_id}",
        "POST /v1/batches/{batch_id}/cancel",
        "POST /v1/batches/{batch_id}/pause",
        "POST /v1/batches/{batch_id}/resume",
    }


def check_operation(operation: Any, url: str) -> None:
    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    ]

    @settings(
        max_examples=20,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def every_answer_conforms(case: Any) -> None:
        response = case.call(base_url=url)
        case.validate_response(response, checks=checks)

    every_answer_conforms()
