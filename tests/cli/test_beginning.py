"""`conserve` alone, and what shells complete of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from conserve.cli.beginning import STEPS
from conserve.cli.main import app
from tests.cli.test_docs import COMMANDS

COMMAND = [sys.executable, "-c", "from conserve.cli.main import main; main()"]
SHELLS = ("bash", "zsh", "fish")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False)


def test_alone_it_says_where_to_begin() -> None:
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    for command, _ in STEPS:
        assert command in done.stdout
    assert len(done.stdout.splitlines()) < 12


def test_what_it_says_can_be_typed() -> None:
    for command, _ in STEPS:
        assert any(command.startswith(name) for name in COMMANDS)
    assert not CliRunner().invoke(app, ["top", "--help"]).exit_code


def test_a_wrong_command_is_still_wrong() -> None:
    done = run("nosuch")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def script(shell: str) -> str:
    """What `--show-completion` prints for it, whichever shell this runs in."""
    with pytest.MonkeyPatch.context() as patch:  # before the command is made
        patch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
        words = ["--show-completion", shell]
        done = CliRunner().invoke(app, words, prog_name="conserve")
    assert done.exit_code == 0
    return done.stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_gets_its_script(shell: str) -> None:
    assert f"_CONSERVE_COMPLETE=complete_{shell}" in script(shell)


def completed(shell: str, words: list[str]) -> set[str]:
    """What the shell would offer for the last of the words."""
    line = " ".join(words)
    ask = {
        "bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    told = {**ask, "_CONSERVE_COMPLETE": f"complete_{shell}"}
    done = CliRunner().invoke(app, [], env=told, prog_name="conserve")
    return set(re.findall(r"[\w-]+", done.stdout))


@pytest.mark.parametrize("shell", SHELLS)
def test_commands_and_options_are_offered(shell: str) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    offered = completed(shell, ["conserve", "b"])
    assert {name for name in commands if name.startswith("b")} <= offered
    assert "top" not in offered
    assert "submit" in completed(shell, ["conserve", "batch", "su"])
    assert "--deadline" in completed(shell, ["conserve", "batch", "submit", "--dead"])


def test_bash_completes_by_the_script_itself(tmp_path: Path) -> None:
    """The script, in a real shell, with the command found by its name."""
    command = tmp_path / "conserve"
    command.write_text(f"#!{sys.executable}\nfrom conserve.cli.main import main; main()\n")
    command.chmod(0o755)
    asked = (
        f"{script('bash')}\nCOMP_WORDS=(conserve batch su); COMP_CWORD=2\n"
        "_conserve_completion conserve; echo ${COMPREPLY[@]}"
    )
    paths = f"{tmp_path}:{os.environ['PATH']}"
    shell = subprocess.run(
        ["bash", "--norc", "-c", asked],
        env={**os.environ, "PATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shell.stdout.strip() == "submit"


def test_help_and_completion_wait_for_no_database_and_no_engine() -> None:
    probe = (
        "import sys, conserve.cli.main\n"
        "print({'sqlalchemy', 'alembic', 'vllm', 'torch', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_ctrl_c_while_commands_are_imported_shows_no_traceback() -> None:
    raising = "import conserve.cli; raise {}"
    command = [sys.executable, "-c", raising.format("KeyboardInterrupt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
    command = [sys.executable, "-c", raising.format("ValueError('of another kind')")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "of another kind" in done.stderr) == (1, True)


AS_FIRST = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
"""Of a container, of which it is all."""


@pytest.mark.parametrize(
    ("imported", "status"),
    [
        ("conserve.cli", 128 + signal.SIGTERM),
        pytest.param("sys", 0, id="control: it hears nothing"),
    ],
)
def test_the_first_process_of_a_container_is_ended_by_sigterm(imported: str, status: int) -> None:
    """From before commands are imported on."""
    if subprocess.run([*AS_FIRST, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no process of this user may have a PID namespace of its own")
    told = f"import {imported}, os, signal; assert os.getpid() == 1; os.kill(1, signal.SIGTERM)"
    done = subprocess.run([*AS_FIRST, sys.executable, "-c", told], check=False)
    assert done.returncode == status
