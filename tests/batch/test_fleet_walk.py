"""The commands of docs/fleet.md that start servers, run as they stand there, on a tiny model."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.batch.builders import jsonl
from tests.batch.tiny_server import CONSERVE, Served, request
from tests.batch.word_llama import make_tiny_llama

pytestmark = [pytest.mark.server, pytest.mark.fleet]

PAGE = Path(__file__).parents[2] / "docs" / "fleet.md"
TITLES = ("One", "Two on one machine", "Several machines")
LINES = jsonl([request(number) for number in range(50)])


def commands(title: str) -> list[str]:
    """The indented lines of a section."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## )", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/fleet.md has no section {title!r}"
    return re.findall(r"^    (\S.*)$", found[1], re.MULTILINE)


class Walk:
    """Places that the page names, as they are here."""

    def __init__(self, folder: Path, postgres_url: str) -> None:
        self.folder, self._postgres_url = folder, postgres_url
        self.model = make_tiny_llama(folder / "model")

    def start(self, title: str) -> list[Served]:
        """The servers of a section, each with what was exported before it."""
        exported: dict[str, str] = {}
        started = []
        for number, words in enumerate(commands(title)):
            if words.startswith("export "):
                name, _, value = words.removeprefix("export ").partition("=")
                exported[name] = self._here(value)
            elif "conserve serve" in words:
                place = self.folder / title.replace(" ", "-") / str(number)
                started.append(Served.of(self._words(words), place, exported))
        return started

    def _here(self, value: str) -> str:
        if value.startswith("postgresql"):
            return self._postgres_url
        return re.sub(r"^s3://bucket", f"file://{self.folder}", value)

    def _words(self, words: str) -> list[str]:
        there = words.replace("MODEL", str(self.model)).replace("/srv", str(self.folder))
        return shlex.split(re.sub(r"--port \d+", "", there))


@contextmanager
def walking(walk: Walk) -> Iterator[dict[str, list[Served]]]:
    """The servers of all sections, beside each other."""
    with ExitStack() as lives:
        servers = {title: walk.start(title) for title in TITLES}
        everybody = [served for started in servers.values() for served in started]
        for served in everybody:
            lives.callback(served.end)
        for served in everybody:
            served.wait()
        yield servers


def test_each_command_is_tried(tmp_path: Path, postgres_url: str) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_bytes(LINES)
    with walking(Walk(tmp_path, postgres_url)) as servers:
        assert [len(each) for each in servers.values()] == [1, 2, 1]
        for title, started in servers.items():
            submit = commands("One")[1].replace("requests.jsonl", str(file))
            words = shlex.split(submit.replace("8000", str(started[0].port)))
            said = subprocess.run(
                [CONSERVE, *words[1:]], capture_output=True, text=True, timeout=900, env=os.environ
            )
            assert said.returncode == 0, f"{title}: {said.stdout}{said.stderr}"
        ids = [
            {batch.id for batch in served.client.batches.list()}
            for served in servers["Two on one machine"]
        ]
        assert ids[0] == ids[1] != set()
