"""Thread binding, OpenMP and KV space."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

import pytest

from conserve.server.start import cpu
from conserve.server.start.amounts import GIB


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    set_machine(monkeypatch, allowed=set(range(2)))


def set_machine(
    monkeypatch: pytest.MonkeyPatch,
    allowed: set[int],
    threads_a_core: int = 1,
    nodes: int = 1,
    limit: float | None = None,
) -> None:
    monkeypatch.setattr(cpu, "cpu_limit", lambda: limit)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
    monkeypatch.setattr(cpu, "_siblings", lambda cpu: str(cpu // threads_a_core))
    monkeypatch.setattr(cpu, "_num_numa_nodes", lambda: nodes)


def bound(num_workers: int = 1, given: str | None = None) -> str | None:
    environ = {} if given is None else {cpu.BIND: given}
    cpu.bind_threads(environ, num_workers)
    return environ.get(cpu.BIND)


def test_all_cpus_of_a_small_machine_compute() -> None:
    assert bound() == "0,1"


def test_a_larger_one_keeps_a_core_for_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    set_machine(monkeypatch, allowed=set(range(16)), threads_a_core=2)
    assert bound() == "0,2,4,6,8,10,12"


def test_each_worker_has_cpus_of_its_own() -> None:
    assert bound(num_workers=2) == "0|1"


def test_more_workers_than_cpus_are_not_bound() -> None:
    assert bound(num_workers=3) == "nobind"


def test_several_numa_nodes_are_left_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    set_machine(monkeypatch, allowed=set(range(8)), nodes=2)
    assert bound() is None


@pytest.mark.parametrize(
    ("limit", "num_workers", "threads"), [(2.5, 1, "2"), (6.0, 2, "3"), (0.5, 1, "1")]
)
def test_within_a_containers_limit_there_are_as_many_threads_as_it_has_time_for(
    monkeypatch: pytest.MonkeyPatch, limit: float, num_workers: int, threads: str
) -> None:
    set_machine(monkeypatch, allowed=set(range(64)), limit=limit)
    environ: dict[str, str] = {}
    said = cpu.bind_threads(environ, num_workers)
    assert environ == {cpu.BIND: "nobind", cpu.THREADS: threads}
    assert f"{threads} threads, not bound: {limit:g} of 64 CPUs" in said


def test_a_limit_of_all_cpus_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    set_machine(monkeypatch, allowed=set(range(2)), limit=2.0)
    assert bound() == "0,1"


def test_the_users_number_of_threads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    set_machine(monkeypatch, allowed=set(range(64)), limit=8.0)
    environ = {cpu.THREADS: "3"}
    assert cpu.bind_threads(environ, 1).startswith("3 threads")


def test_the_users_binding_stays() -> None:
    assert bound(given="1") == "1"


def test_openmp_is_preloaded_beside_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    library = tmp_path / "lib" / "libiomp5.so"
    library.touch()
    environ = {"LD_PRELOAD": "libjemalloc.so"}
    assert cpu.preload_openmp(environ, tmp_path) == "libiomp5 preloaded"
    assert environ["LD_PRELOAD"] == f"libjemalloc.so:{library}"


@pytest.mark.parametrize("given", ["/x/libgomp.so.1", "/x/libiomp5.so", "/x/libomp.so"])
def test_the_users_openmp_stays(given: str, tmp_path: Path) -> None:
    environ = {"LD_PRELOAD": given}
    cpu.preload_openmp(environ, tmp_path)
    assert environ == {"LD_PRELOAD": given}


def test_without_the_library_nothing_is_preloaded(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    assert "intel-openmp" in cpu.preload_openmp(environ, tmp_path)
    assert environ == {}


@pytest.mark.parametrize(
    ("available_gib", "default_model", "chosen_gib"),
    [(20, True, 1), (20, False, 5), (2, True, 0.5), (2, False, 0.5)],
)
def test_kv_space(available_gib: int, default_model: bool, chosen_gib: float) -> None:
    chosen = cpu.kv_cache_bytes(available_gib * GIB, default_model)
    assert chosen == chosen_gib * GIB


def test_the_default_models_tokens_take_twice_the_space_in_float32() -> None:
    assert cpu.kv_cache_bytes(20 * GIB, True, num_bytes=4) == 2 * GIB
    assert cpu.kv_cache_bytes(20 * GIB, False, num_bytes=4) == 5 * GIB


def test_kv_space_is_what_the_user_says() -> None:
    assert cpu.kv_space_bytes(Namespace(kv_cache_memory_bytes=7), {cpu.KV_SPACE: "3"}) == 7
    assert cpu.kv_space_bytes(Namespace(kv_cache_memory_bytes=None), {cpu.KV_SPACE: "3"}) == 3 << 30
    assert cpu.kv_space_bytes(Namespace(kv_cache_memory_bytes=None), {}) == 0
