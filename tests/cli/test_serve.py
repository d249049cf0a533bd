"""`conserve serve` with bad input: one message, exit code 2, no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conserve.server.errors import BadInputError
from conserve.server.start.flags import flags, read_early
from tests.engine.engine import TINY

CONSERVE = str(Path(sys.executable).with_name("conserve"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([CONSERVE, *arguments], capture_output=True, text=True, timeout=120)


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("conserve serve: ")]
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("flag", ["--slo-ttft-ms", "--slo-tbt-ms"])
@pytest.mark.parametrize("value", ["0", "-5", "soon", "nan", "inf", ""])
def test_a_target_that_is_no_time(flag: str, value: str) -> None:
    done = run("serve", f"{flag}={value}")
    assert_refused(done, flag, "must be", repr(value))
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("value", ["1", "-0.1", "all"])
def test_a_floor_that_is_no_share(value: str) -> None:
    assert_refused(run("serve", f"--offline-floor={value}"), "--offline-floor", repr(value))


@pytest.mark.parametrize("flag", ["--checkpoint-bytes", "--checkpoint-dir-bytes"])
@pytest.mark.parametrize("value", ["much", "-5", "0", "8 bits", ""])
def test_a_size_that_is_none(flag: str, value: str) -> None:
    assert_refused(run("serve", f"{flag}={value}"), flag, "must be a size", repr(value))


def test_a_checkpoint_mode_nobody_knows() -> None:
    done = run("serve", "--checkpoint=always")
    assert_refused(done, "--checkpoint", "incremental, swap, off", "'always'")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("1024", 1024), ("8GiB", 8 << 30), ("8G", 8 << 30), ("1.5gib", 3 << 29), ("2kB", 2000),
     ("3 TB", 3 * 10**12), ("7B", 7), ("1m", 1 << 20)],
)  # fmt: skip
def test_sizes(text: str, num_bytes: int) -> None:
    (flag,) = (flag for flag in flags() if flag.name == "--checkpoint-bytes")
    assert flag.parse is not None
    assert flag.parse(text) == num_bytes


@pytest.mark.parametrize(
    ("flag", "value", "what"),
    [
        ("--flex-wait-s", "0", "above 0 seconds"),
        ("--flex-wait-s", "soon", "a number"),
        ("--flex-max-waiting", "0", "a whole number from 1 on"),
        ("--router-metrics", "offline", "one of online, all"),
        ("--priority-order", "vllm", "one of lower-first, higher-first"),
    ],
)
def test_what_clients_and_routers_get_is_named_right(flag: str, value: str, what: str) -> None:
    with pytest.raises(BadInputError) as refused:
        read_early([f"{flag}={value}"])
    assert str(refused.value) == f"{flag}: must be {what}, not {value!r}"


def test_flags_are_read_without_vllm() -> None:
    """Its import takes seconds; a wrong flag is answered before that."""
    code = (
        "import sys; from conserve.server.start import flags; "
        "print({'vllm', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n", done.stdout


def test_a_data_folder_without_a_name() -> None:
    assert_refused(run("serve", "--data-dir="), "--data-dir", "must name a folder")


@pytest.mark.engine
def test_a_data_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    done = run("serve", str(model), "--port", "0", "--data-dir", str(tmp_path / "file" / "data"))
    assert_refused(done, "--data-dir", "cannot be written", "--no-batches")


@pytest.mark.engine
def test_a_flag_nobody_knows() -> None:
    """Through a process: whatever vLLM's import says stays off the message."""
    assert_refused(run("serve", "--no-such-flag", "1"), "--no-such-flag")


@pytest.mark.engine
@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--api-server-count", "2"), "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        (("--max-model-len", "99999"), "max_model_len"),
    ],
)
def test_what_vllm_refuses_when_it_configures_itself(
    flags: tuple[str, ...], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    place = ("--port", "0", "--no-batches", "--skip-tokenizer-init")
    done = run("serve", str(tmp_path), *place, *flags)
    assert done.returncode == 2, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("conserve serve: ")]
    assert word in said
    assert "Traceback" not in done.stderr + done.stdout
