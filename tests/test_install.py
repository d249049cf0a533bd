"""`make setup` goes on where it stopped, and says how far it is; with a stand-in for pip."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from scripts import install
from scripts.installed import installed, is_whole

# Installs into the folder named first as pip does: files, then RECORD with INSTALLER in it. It
# dies before the RECORD of the package `dies`, and finds no package `absent`.
STAND_IN = """
import os, sys
from pathlib import Path
site = Path(sys.argv[1])
for spec in sys.argv[2:]:
    name, version = spec.split("==")
    print(f"WARNING: Location 'file:///nowhere/{name}/' is ignored: it is no folder.")
    if name == "absent":
        sys.exit("ERROR: No matching distribution found for absent\\n  in any index")
    info = f"{name}-{version}.dist-info"
    (site / info).mkdir()
    (site / f"{name}.py").write_text("x = 1\\n")
    metadata = f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n"
    (site / info / "METADATA").write_text(metadata)
    (site / info / "RECORD").write_text(f"{name}.py,,6\\n{info}/RECORD,,\\n")
    if name == "dies":
        os._exit(9)
    (site / info / "RECORD").write_text(f"{name}.py,,6\\n{info}/INSTALLER,,\\n{info}/RECORD,,\\n")
    (site / info / "INSTALLER").write_text("pip\\n")
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    return folder


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def pip(
    tmp_path: Path, site: Path, out: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> Iterator[install.Pip]:
    script = tmp_path / "pip.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(install, "PIP", [sys.executable, str(script), str(site)])
    with (tmp_path / "setup.lock").open("w") as lock:
        yield install.Pip(tmp_path, lock, install.Screen(out))


def test_packages_are_installed_and_their_number_is_said(
    site: Path, pip: install.Pip, out: io.StringIO
) -> None:
    assert install.install_pins({"one": "1.0", "two": "2.0"}, site, pip) == 0
    assert set(installed(site)) == {"one", "two"}
    assert "setup: 2 of 2 packages, 0 MB, 0 min" in out.getvalue()


def test_a_second_set_up_installs_only_what_is_missing(
    site: Path, pip: install.Pip, out: io.StringIO
) -> None:
    install.install_pins({"one": "1.0"}, site, pip)
    assert install.install_pins({"one": "1.0", "two": "2.0"}, site, pip) == 0
    assert "setup: 1 of 2 packages are missing" in out.getvalue()


def test_half_a_package_does_not_count_and_is_installed_again(
    site: Path, pip: install.Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert install.install_pins({"a": "1.0", "dies": "1.0"}, site, pip) == 9
    left = Distribution.at(site / "dies-1.0.dist-info")
    assert left.version == "1.0"  # it looks installed to pip
    assert not is_whole(left)
    assert set(installed(site)) == {"a"}
    assert not (site / "dies-1.0.dist-info").exists()
    script = Path(install.PIP[1])
    script.write_text(script.read_text().replace('"dies"', '"nobody"'))
    assert install.install_pins({"a": "1.0", "dies": "1.0"}, site, pip) == 0
    assert set(installed(site)) == {"a", "dies"}


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_package_whose_files_are_damaged_does_not_count(
    site: Path, pip: install.Pip, damage: str
) -> None:
    install.install_pins({"one": "1.0"}, site, pip)
    file = site / "one.py"
    file.write_text("") if damage == "cut" else file.unlink()
    assert installed(site) == {}


def test_what_pip_was_replacing_is_removed(site: Path) -> None:
    (site / "~ne-1.0.dist-info").mkdir()
    (site / "~ne.py").write_text("")
    installed(site)
    assert list(site.iterdir()) == []


def test_an_error_of_pip_is_shown_whole_and_a_warning_once_a_kind(
    site: Path, pip: install.Pip, out: io.StringIO
) -> None:
    pins = {f"a{i}": "1.0" for i in range(20)} | {"absent": "3.0"}
    assert install.install_pins(pins, site, pip) == 1
    said = out.getvalue()
    assert "ERROR: No matching distribution found for absent\n  in any index\n" in said
    assert "setup: pip could not install" in said
    assert said.count("WARNING: ") == 1
    assert pip.log.read_text().count("WARNING: ") == 21


def test_a_build_from_an_index_of_its_own_comes_first_and_is_explained(
    site: Path, pip: install.Pip, out: io.StringIO
) -> None:
    script = Path(install.PIP[1])
    script.write_text(script.read_text().replace('"absent"', '"torch"'))
    assert install.install_pins({"one": "1.0", "torch": "2.0+cpu"}, site, pip) == 1
    assert "docs/install.md" in out.getvalue()
    assert installed(site) == {}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("screen", "rewrites"), [(io.StringIO, False), (Terminal, True)])
def test_only_a_terminal_is_sent_control_characters(
    site: Path, pip: install.Pip, screen: type[io.StringIO], rewrites: bool
) -> None:
    shown = screen()
    pip.screen = install.Screen(shown)
    install.install_pins({"one": "1.0"}, site, pip)
    assert ("\x1b" in shown.getvalue()) == rewrites
    assert ("\r" in shown.getvalue()) == rewrites


def test_two_set_ups_take_turns(tmp_path: Path) -> None:
    """The second waits for the lock, which a pip that outlives the first holds as well."""
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX)"
    holder += "; print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "setup.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        said: list[str] = []

        def say(line: str) -> None:
            said.append(line)
            process.communicate()  # the first lets go

        with install.one_at_a_time(tmp_path, say):
            assert said == [f"setup: waiting for another set-up of {tmp_path}"]
