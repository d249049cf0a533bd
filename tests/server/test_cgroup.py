"""Limits of containers, as versions 1 and 2 of control groups write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from conserve.server.start.cgroup import cpu_limit, memory_limit_bytes

GIB = 1 << 30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def belongs(root: Path, *lines: str) -> None:
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))


def group(root: Path, path: str, **files: str) -> None:
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{text}\n")


def test_version_2_in_a_container_of_its_own_tree(root: Path) -> None:
    belongs(root, "0::/")
    group(root, "", cpu_max="150000 100000", memory_max=str(4 * GIB))
    assert cpu_limit(root) == 1.5
    assert memory_limit_bytes(root) == 4 * GIB


def test_the_least_limit_of_a_group_and_those_above_holds(root: Path) -> None:
    belongs(root, "0::/pods/one/server")
    group(root, "pods", cpu_max="800000 100000", memory_max=str(64 * GIB))
    group(root, "pods/one", cpu_max="200000 100000", memory_max=str(8 * GIB))
    group(root, "pods/one/server", cpu_max="max 100000", memory_max="max")
    group(root, "pods/other", cpu_max="10000 100000", memory_max="1000")
    assert cpu_limit(root) == 2.0
    assert memory_limit_bytes(root) == 8 * GIB


def test_version_1_has_a_tree_for_each_controller(root: Path) -> None:
    belongs(root, "5:memory:/docker/x", "4:cpu,cpuacct:/docker/x", "0::/")
    quota = {"cpu_cfs_quota_us": "250000", "cpu_cfs_period_us": "100000"}
    group(root, "cpu,cpuacct/docker/x", **quota)
    group(root, "memory/docker/x", memory_limit_in_bytes=str(2 * GIB))
    assert cpu_limit(root) == 2.5
    assert memory_limit_bytes(root) == 2 * GIB


def test_version_1_with_the_hosts_path_in_a_container(root: Path) -> None:
    belongs(root, "4:cpu:/docker/of-the-host", "5:memory:/docker/of-the-host")
    group(root, "cpu", cpu_cfs_quota_us="100000", cpu_cfs_period_us="100000")
    group(root, "memory", memory_limit_in_bytes=str(GIB))
    assert cpu_limit(root) == 1.0
    assert memory_limit_bytes(root) == GIB


def test_no_limit_is_none(root: Path) -> None:
    assert cpu_limit(root) is None
    belongs(root, "0::/", "4:cpu:/", "5:memory:/")
    group(root, "", cpu_max="max 100000", memory_max="max")
    group(root, "cpu", cpu_cfs_quota_us="-1", cpu_cfs_period_us="100000")
    group(root, "memory", memory_limit_in_bytes=str((1 << 63) - 4096))
    assert cpu_limit(root) is None
    assert memory_limit_bytes(root) is None
