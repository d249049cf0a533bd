"""`make vllm-next`: a wheel is taken apart, and what ran on it is read."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import pytest

from scripts.vllm_next import suite, wheel

METADATA = """Metadata-Version: 2.1
Name: vllm
Version: 0.40.1
Requires-Dist: pytest>=1
Requires-Dist: no-such-package-here==7; python_version >= "3"
Requires-Dist: packaging>=1000
Requires-Dist: another-one; extra == "audio"

Its description.
Version: not this one
"""


@pytest.fixture
def unpacked(tmp_path: Path) -> wheel.Unpacked:
    made = tmp_path / "vllm-0.40.1-cp38-abi3-manylinux.whl"
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("vllm/__init__.py", "")
        archive.writestr("vllm/_C.abi3.so", "machine code")
        archive.writestr("vllm-0.40.1.dist-info/METADATA", METADATA)
    folder = tmp_path / "unpacked"
    wheel.unpack(made, folder, libraries=False)
    wheel.name_the_platform(folder)
    return wheel.Unpacked(folder, "vllm")


def test_a_wheel_is_unpacked_without_what_is_cudas(unpacked: wheel.Unpacked) -> None:
    files = [path for path in unpacked.folder.rglob("*") if path.is_file()]
    names = {path.relative_to(unpacked.folder).as_posix() for path in files}
    assert names == {"vllm/__init__.py", "vllm-0.40.1+cpu.dist-info/METADATA"}
    assert unpacked.version == "0.40.1"
    assert unpacked.header("Version") == ["0.40.1+cpu"]
    assert "\nVersion: not this one\n" in unpacked.metadata.read_text()


def test_what_is_missing_beside_it_is_named(unpacked: wheel.Unpacked) -> None:
    missing, other = wheel.unmet(unpacked.needs())
    assert missing == ["no-such-package-here==7"]
    (packaging,) = other
    assert re.fullmatch(r"packaging \S+ \(wants >=1000\)", packaging)


def test_one_versions_python_over_anothers_kernels(
    unpacked: wheel.Unpacked, tmp_path: Path
) -> None:
    (tmp_path / "libraries").mkdir()
    library = tmp_path / "libraries" / "_C.abi3.so"
    library.write_text("kernels")
    for _ in range(2):  # what a run before has left is made anew
        mixed = wheel.with_kernels(unpacked, library.parent, tmp_path / "mixed")
    assert (mixed.vllm / "_C.abi3.so").resolve() == library
    assert (mixed.vllm / "__init__.py").resolve() == unpacked.vllm / "__init__.py"
    assert mixed.version == unpacked.version


def test_a_version_that_pip_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NEXT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(wheel.NoSuchWheelError, match=r"No matching distribution .*vllm==99\.0"):
        wheel.take("vllm", "99.0")


REPORT = """<testsuites><testsuite>
<testcase classname="tests.engine.test_a" name="test_good" />
<testcase classname="tests.engine.test_a" name="test_left"><skipped message="no GPU" /></testcase>
<testcase classname="tests.engine.test_b" name="test_bad[x]">
  <failure message="ImportError: no name&#10;more of it">trace</failure></testcase>
<testcase classname="tests.engine.test_c" name="test_setup">
  <error message="failed on setup">trace</error></testcase>
</testsuite></testsuites>"""


def test_what_ran_is_read() -> None:
    outcome = suite.read(ElementTree.fromstring(REPORT))
    assert (outcome.passed, outcome.skipped) == (1, 1)
    assert outcome.failed == [
        "failed: test_b::test_bad[x]: ImportError: no name",
        "failed: test_c::test_setup: failed on setup",
    ]


def test_tests_find_this_vllm_first_and_may_use_it(tmp_path: Path) -> None:
    made = suite.environment(tmp_path)
    assert made["PYTHONPATH"].split(":")[:2] == [str(tmp_path), str(suite.ROOT / "src")]
    assert made["CONSERVE_ALLOW_UNTESTED_VLLM"] == "1"
