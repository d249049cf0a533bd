"""What the documentation says of settings, states, codes and fields is what the code has."""

from __future__ import annotations

import re
from pathlib import Path

from conserve.batch.lifecycle import TRANSITIONS
from conserve.batch.settings import BatchSettings
from conserve.batch.wire import BatchCreate, BatchObject
from conserve.cli.batch import app

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "batches.md").read_text()
BATCH = ROOT / "src" / "conserve" / "batch"
VALIDATION = "".join((BATCH / name).read_text() for name in ("validation.py", "request_line.py"))


def test_every_setting_is_in_the_table() -> None:
    named = set(re.findall(r"^\| `(\w+)` \| ", PAGE.split("## Settings")[1], re.MULTILINE))
    assert named == set(BatchSettings.model_fields)


def test_the_states_are_drawn_as_they_are() -> None:
    drawn = {
        found[1]: set(found[2].split(" | "))
        for found in re.finditer(r"^    (\w+) +-> ([\w |]+)$", PAGE, re.MULTILINE)
    }
    assert drawn == {str(now): set(nexts) for now, nexts in TRANSITIONS.items() if nexts}


def test_every_code_of_a_bad_line_is_listed() -> None:
    codes = set(re.findall(r'(?:BadLineError|_refuse)\(\s*(?:[\w.]+, )?"(\w+)"', VALIDATION))
    codes |= {"stream_not_supported", "background_not_supported"}
    assert len(codes) == 14
    assert {code for code in codes if f"`{code}`" not in PAGE} == set()


def test_every_field_and_command_of_ours_is_named() -> None:
    theirs = {"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"}
    ours = set(BatchCreate.model_fields) - theirs
    fields = list(BatchObject.model_fields)
    ours |= set(fields[fields.index("usage") + 1 :])
    assert {name for name in ours if f"`{name}`" not in PAGE} == set()
    for command in app.registered_commands:
        assert command.callback is not None
        assert f"conserve batch {command.name or command.callback.__name__}" in PAGE
