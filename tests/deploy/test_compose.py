"""deploy/compose.yaml, run: two servers, PostgreSQL and Prometheus. `make image-test`.

PostgreSQL and Prometheus are the images that it names where a hub has them, else of Debian's
packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from conserve.bench.ports import free_port
from tests.deploy.container import KEY, LINES, Container, Engine, answered, submit
from tests.deploy.test_containers import COMPOSE, DEPLOY, SERVERS
from tests.waiting import eventually

pytestmark = pytest.mark.image

STAND_INS = Path(__file__).parent / "stand_ins"


@dataclass(frozen=True)
class Project:
    """The running services."""

    engine: Engine
    words: list[str]
    folder: Path
    ports: dict[str, int]

    def compose(self, *words: str) -> str:
        environment = os.environ | {"CONSERVE_API_KEY": KEY}
        done = subprocess.run(
            [*self.words, *words],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def container(self, service: str) -> Container:
        label = f"--filter=label=com.docker.compose.service={service}"
        project = f"--filter=label=com.docker.compose.project={self.folder.name}"
        name = self.engine.run("ps", "--all", "--quiet", label, project)
        return Container(self.engine, name, f"http://127.0.0.1:{self.ports.get(service, 0)}")


def compose_words(engine: Engine) -> list[str]:
    if engine.program == "docker":
        done = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("docker has no plugin `compose`")
        return ["docker", "compose"]
    found = shutil.which("podman-compose", path=str(Path(sys.executable).parent))
    assert found is not None
    return [found]


@pytest.fixture(scope="module")
def others(engine: Engine, request: pytest.FixtureRequest) -> dict[str, str]:
    """The images of PostgreSQL and Prometheus: as compose names them, or stand-ins."""
    found: dict[str, str] = {}
    for service in ("postgres", "prometheus"):
        image = COMPOSE["services"][service]["image"]
        if not engine.has(image):
            base = f"--build-arg=BASE={request.getfixturevalue('base')}"
            image = f"localhost/conserve-test-{service}"
            words = ["--network=host", base, f"--tag={image}"]
            words.append(f"--file={STAND_INS}/Dockerfile.{service}")
            engine.run("build", *words, str(STAND_INS))
        found[service] = image
    return found


def as_tested(image: str, others: dict[str, str]) -> tuple[dict[str, Any], dict[str, int]]:
    """The compose file on ports that are free, with images that are here; and those ports."""
    content: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    ports = {}
    for name, service in content["services"].items():
        service["image"] = image if name in SERVERS else others[name]
        service.pop("build", None)
        if "ports" in service:
            (published,) = service["ports"]
            ports[name] = free_port()
            service["ports"] = [f"127.0.0.1:{ports[name]}:{published.rpartition(':')[2]}"]
        service["volumes"] = [
            str(DEPLOY / each) if each.startswith("./") else each for each in service["volumes"]
        ]
    del content["name"]  # the folder's
    return content, ports


@pytest.fixture(scope="module")
def project(
    engine: Engine,
    image: str,
    others: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("compose") / f"conserve{uuid4().hex}"
    folder.mkdir()
    content, ports = as_tested(image, others)
    (folder / "compose.yaml").write_text(yaml.safe_dump(content))
    found = Project(engine, compose_words(engine), folder, ports)
    try:
        found.compose("up", "--detach", "postgres")
        if engine.program == "podman":  # which looks only when asked, where systemd does not ask
            eventually(lambda: healthy(found.container("postgres")))
        found.compose("up", "--detach")
        for server in SERVERS:
            found.container(server).await_health()
        yield found
    finally:
        found.compose("down", "--volumes")


def healthy(container: Container) -> bool:
    words = [container.engine.program, "healthcheck", "run", container.name]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def test_a_batch_of_one_server_is_read_at_the_other(project: Project) -> None:
    one, two = (project.container(server).client() for server in SERVERS)
    with closing(one), closing(two):
        batch = submit(one, 5)
        assert sorted(answered(two, batch)) == ["0", "1", "2", "3", "4"]


def offline_requests(server: Container) -> float:
    """That came to its engine."""
    text = httpx.get(f"{server.url}/metrics").text
    (family,) = [
        family
        for family in text_string_to_metric_families(text)
        if family.name == "conserve:requests"
    ]
    return sum(s.value for s in family.samples if s.labels.get("class") == "offline")


def test_both_run_a_batch_of_one(project: Project) -> None:
    servers = [project.container(server) for server in SERVERS]
    with closing(servers[0].client()) as client:

        def shared() -> bool:
            before = [offline_requests(server) for server in servers]
            lines = answered(client, submit(client, LINES))
            assert sorted(lines) == sorted(str(i) for i in range(LINES))
            return all(
                offline_requests(server) > count
                for server, count in zip(servers, before, strict=True)
            )

        eventually(shared)


def test_prometheus_sees_both_and_has_the_alerts(project: Project) -> None:
    url = f"http://127.0.0.1:{project.ports['prometheus']}/api/v1"

    def seen() -> set[str]:
        text = "up == 1 and on (instance) conserve:harvest_budget_ratio"
        found = httpx.get(f"{url}/query", params={"query": text})
        return {each["metric"]["instance"] for each in found.json()["data"]["result"]}

    eventually(lambda: seen() == {f"{server}:8000" for server in SERVERS})
    (group,) = httpx.get(f"{url}/rules").json()["data"]["groups"]
    assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}


def test_what_a_server_that_goes_leaves_the_other_runs(project: Project) -> None:
    gone, stays = (project.container(server) for server in SERVERS)
    with closing(gone.client()) as client:
        batch = submit(client, LINES)
        eventually(lambda: client.batches.retrieve(batch).status == "in_progress")
    assert gone.stop().wait() == 0
    assert gone.engine.inspect(gone.name)["State"]["ExitCode"] == 0, gone.log()
    with closing(stays.client()) as client:
        assert sorted(answered(client, batch)) == sorted(str(i) for i in range(LINES))
