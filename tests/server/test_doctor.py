"""What `conserve doctor` finds in places and on machines that are made up."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from typer.testing import CliRunner

from conserve.batch import drivers
from conserve.batch.database import Database
from conserve.cli.main import app
from conserve.server.doctor import model as model_module
from conserve.server.doctor import report as report_module
from conserve.server.doctor import running as running_module
from conserve.server.doctor import versions as versions_module
from conserve.server.doctor.finding import Finding, Level
from conserve.server.doctor.machine import machine
from conserve.server.doctor.model import model
from conserve.server.doctor.report import report
from conserve.server.doctor.running import running
from conserve.server.doctor.versions import versions
from tests.server.dashboard_world import served

SMI = """#!/bin/sh
echo "NVIDIA H100, 570.1, 81559 MiB, 3 MiB, 9.0"
"""
BROKEN_SMI = """#!/bin/sh
echo "Failed to initialize NVML: Driver/library version mismatch"
exit 18
"""


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the test's own."""
    for name in ("DATABASE_URL", "FILES_URL", "OWNER_LIMITS"):
        monkeypatch.delenv(f"CONSERVE_BATCH_{name}", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CONSERVE_BATCH_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture
def port() -> Iterator[str]:
    """Of no server, and taken by nobody: it is bound, and may be bound again."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        yield str(probe.getsockname()[1])


def looked(tmp_path: Path, port: str, *words: str) -> list[Finding]:
    environ = {"CONSERVE_BATCH_DATA_DIR": str(tmp_path / "data")}
    return report(["--port", port, "--host", "127.0.0.1", *words], environ)


def found(findings: Sequence[Finding], name: str) -> Finding:
    (only,) = (each for each in findings if each.name == name)
    return only


def test_a_machine_that_is_well_has_no_problem(tmp_path: Path, port: str) -> None:
    findings = looked(tmp_path, port)
    sections = list(dict.fromkeys(each.section for each in findings))
    assert sections == ["versions", "machine", "settings", "places"]
    assert [each for each in findings if each.level is Level.PROBLEM] == []
    assert found(findings, "database").text.endswith("made at the first start")


def test_every_warning_and_problem_has_a_fix_and_nothing_else_has(
    tmp_path: Path, port: str
) -> None:
    (tmp_path / "data").write_text("")
    findings = looked(tmp_path, port)
    judged = {Level.WARNING, Level.PROBLEM}
    assert any(each.level is Level.PROBLEM for each in findings)
    assert all(bool(each.fix) == (each.level in judged) for each in findings)


def test_looking_makes_nothing(tmp_path: Path, port: str) -> None:
    looked(tmp_path, port)
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_a_warning(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        told = found(looked(tmp_path, str(taken.getsockname()[1])), "port")
    assert told.level is Level.WARNING
    assert "--port" in told.fix


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ((), "SmolLM2-135M-Instruct"),
        (("org/model",), "org--model"),
        (("org/model", "--served-model-name", "ours", "theirs"), "ours"),
        (("--model=org/model", "--served-model-name=ours"), "ours"),
    ],
)
def test_the_data_folder_is_the_one_that_a_server_would_have(
    tmp_path: Path, words: tuple[str, ...], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(report_module, "model", lambda words: iter(()))
    told = found(report([*words, "--port", "0"], {}), "data folder")
    assert told.text.startswith(f"{tmp_path / 'conserve' / name} ")


def test_a_data_folder_that_is_a_file_is_a_problem(tmp_path: Path, port: str) -> None:
    (tmp_path / "data").write_text("")
    told = found(looked(tmp_path, port), "data folder")
    assert told.level is Level.PROBLEM
    assert "--data-dir" in told.fix


def test_a_data_folder_that_may_not_be_looked_into_is_a_problem(
    tmp_path: Path, port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As below the home of another user; root, who may be running this, may look everywhere."""
    closed, stat, access = tmp_path / "closed", os.stat, os.access
    closed.mkdir()

    def no_stat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if not isinstance(path, int) and closed in Path(path).parents:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", no_stat)
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed and access(path, mode))
    told = found(looked(tmp_path, port, "--data-dir", str(closed / "data")), "data folder")
    assert told.level is Level.PROBLEM
    assert str(closed) in told.text


@pytest.mark.parametrize(
    ("revision", "level"), [("", Level.OK), ("0001", Level.WARNING), ("9999", Level.PROBLEM)]
)
def test_the_databases_revision_is_compared(
    tmp_path: Path, port: str, revision: str, level: Level
) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "batches.db"
    asyncio.run(_migrate(file))
    if revision:
        with closing(sqlite3.connect(file)) as connection, connection:
            connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    assert found(looked(tmp_path, port), "database").level is level


async def _migrate(file: Path) -> None:
    database = Database(f"sqlite+aiosqlite:///{file}")
    await database.migrate()
    await database.close()


def test_a_database_without_tables_is_well(tmp_path: Path, port: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "batches.db").touch()
    told = found(looked(tmp_path, port), "database")
    assert told.level is Level.OK
    assert "tables come at the first start" in told.text


@pytest.mark.parametrize(
    ("setting", "address", "name", "said"),
    [
        ("DATABASE_URL", "postgresql+asyncpg://me:word@127.0.0.1:9/x", "database", "not answer"),
        ("DATABASE_URL", "postgresql://me:word@127.0.0.1:9/x", "database", "postgresql+asyncpg"),
        ("DATABASE_URL", "no address", "database", "Could not parse"),
        ("FILES_URL", "s3://bucket/folder", "files", "needs the package s3fs"),
        ("FILES_URL", "nowhere://bucket", "files", "nowhere"),
    ],
)
def test_a_place_that_cannot_be_reached_is_a_problem(
    tmp_path: Path,
    port: str,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    address: str,
    name: str,
    said: str,
) -> None:
    monkeypatch.setattr(drivers, "find_spec", lambda name: None if name == "s3fs" else object())
    monkeypatch.setenv(f"CONSERVE_BATCH_{setting}", address)
    told = found(looked(tmp_path, port), name)
    assert told.level is Level.PROBLEM
    assert said in told.text
    assert setting in told.fix or "pip install" in told.fix


def test_a_vllm_that_is_not_tried_is_a_problem_unless_it_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = {"vllm": "0.34.0"}
    monkeypatch.setattr(versions_module, "installed", lambda package: numbers.get(package, ""))
    monkeypatch.delenv("CONSERVE_ALLOW_UNTESTED_VLLM", raising=False)
    told = found(list(versions()), "vllm")
    assert told.level is Level.PROBLEM
    assert "pip install 'vllm>=0.32,<0.34'" in told.fix
    monkeypatch.setenv("CONSERVE_ALLOW_UNTESTED_VLLM", "1")
    assert found(list(versions()), "vllm").level is Level.WARNING
    numbers["vllm"] = "0.33.0"
    assert found(list(versions()), "vllm").level is Level.OK


def test_two_builds_of_vllm_are_a_problem_and_none_is_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(versions_module, "installed", lambda package: "1.0")
    assert found(list(versions()), "vllm").level is Level.PROBLEM
    monkeypatch.setattr(versions_module, "installed", lambda package: "")
    told = found(list(versions()), "vllm")
    assert told.level is Level.WARNING
    assert "pip install" in told.fix


def test_a_containers_limits_are_said(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "proc/cpuinfo").write_text("model name\t: A CPU\nflags\t\t: fpu avx2 amx_bf16\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("50000 100000\n")
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{1 << 30}\n")
    findings = list(machine(tmp_path))
    assert found(findings, "processor").text == "A CPU"
    assert found(findings, "instructions").text == "avx2, amx_bf16"
    assert "allows the time of 0.5" in found(findings, "CPUs").text
    assert "allows 1.0 GiB" in found(findings, "memory").text
    assert found(findings, "CPUs").level is found(findings, "memory").level is Level.WARNING


@pytest.mark.parametrize(
    ("script", "name", "level", "said"),
    [
        (SMI, "GPU 0", Level.OK, "NVIDIA H100, driver 570.1, 81559 MiB, used 3 MiB"),
        (BROKEN_SMI, "GPUs", Level.PROBLEM, "Driver/library version mismatch"),
    ],
)
def test_gpus_are_what_the_driver_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    name: str,
    level: Level,
    said: str,
) -> None:
    (tmp_path / "nvidia-smi").write_text(script)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    told = found(list(machine()), name)
    assert told.level is level
    assert said in told.text


def test_a_model_that_is_refused_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of its own ends before it imports vLLM: the flag is wrong."""
    monkeypatch.setattr(model_module, "installed", lambda: "0.33.0")
    (told,) = model(["some/model", "--slo-ttft-ms", "soon"])
    assert told.level is Level.PROBLEM
    assert "--slo-ttft-ms" in told.text


def test_a_model_without_vllm_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "installed", lambda: None)
    (told,) = model(["some/model"])
    assert "no vLLM" in told.text


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Of a server that has a scheduler of ours, and neither batches nor a page."""
    one = FastAPI()
    one.get("/health")(lambda: {"status": "ok"})
    one.get("/version")(lambda: {"version": "0.32.0"})
    one.get("/v1/models")(lambda: {"data": [{"id": "a-model", "max_model_len": 512}]})
    one.get("/metrics")(lambda: PlainTextResponse("conserve:requests_total 1.0\n"))
    with served(one) as (url, _):
        yield url


def test_a_server_that_runs_is_asked(url: str) -> None:
    findings = list(running(f"{url}/v1", ""))
    assert found(findings, url).level is Level.OK
    assert found(findings, "models").text == "a-model (512 tokens)"
    assert found(findings, "scheduler").level is Level.OK
    assert "--no-batches" in found(findings, "/v1/batches").text


def test_the_command_ends_with_1_on_a_problem(url: str, port: str) -> None:
    at = ["doctor", "--port", port, "--host", "127.0.0.1", "--json", "--url"]
    well = CliRunner().invoke(app, [*at, url])
    assert well.exit_code == 0, well.output
    assert {"section", "name", "text", "level", "fix"} == set(json.loads(well.stdout)[0])
    away = CliRunner().invoke(app, [*at, "http://127.0.0.1:9"])
    assert away.exit_code == 1
    assert json.loads(away.stdout)[-1]["level"] == "problem"


def test_in_a_terminal_fixes_stand_under_what_they_mend(port: str) -> None:
    words = ["doctor", "--port", port, "--host", "127.0.0.1", "--url", "http://127.0.0.1:9"]
    told = CliRunner().invoke(app, words).stdout
    assert "\n✗  http://127.0.0.1:9  does not answer: " in told
    assert "→ Start it, or correct --url." in told
    assert told.rstrip().endswith("warnings") or "1 problem, " in told


def test_a_port_that_is_no_number_is_refused() -> None:
    done = CliRunner().invoke(app, ["doctor", "--port", "nine"])
    assert done.exit_code == 2
    assert "--port" in done.output


def test_a_certificate_of_an_own_ca_is_what_is_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed")

    monkeypatch.setattr(running_module, "client_for", refuse)
    (found,) = running("https://s", "")
    assert "SSL_CERT_FILE" in found.fix
