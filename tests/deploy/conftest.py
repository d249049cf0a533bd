"""Prometheus, real, for the tests of what operators plug in; a container engine and our image."""

from __future__ import annotations

import os

import pytest

from scripts.image import CannotBuildError, build, debian_from_packages, find_builder
from tests.debian import program
from tests.deploy.container import Engine

BASE = "debian:bookworm-slim"


@pytest.fixture(scope="session")
def promtool() -> str:
    return program("prometheus", "usr/bin/promtool")


@pytest.fixture(scope="session")
def prometheus() -> str:
    return program("prometheus", "usr/bin/prometheus")


@pytest.fixture(scope="session")
def engine() -> Engine:
    try:
        return Engine(find_builder(("docker", "podman")))
    except CannotBuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def base(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Debian's image, or where no hub has it, one made of Debian's packages."""
    if engine.has(BASE):
        return BASE
    return debian_from_packages(engine.program, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def image(request: pytest.FixtureRequest) -> str:
    if ready := os.environ.get("CONSERVE_IMAGE"):
        return ready
    tag = "localhost/conserve:test"
    build("cpu", tag, base=request.getfixturevalue("base"))
    return tag
