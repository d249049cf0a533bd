"""Install the locks and ConServe into the environment of the Python that runs this:

    .venv/bin/python -m scripts.install requirements/cpu.lock requirements/dev.lock

pip installs a few packages at a time, so that one line says how far it is, and a set-up that was
interrupted goes on with the packages that are missing. A package counts as installed when pip
finished it, which a killed pip did not. pip's configuration (indexes, proxies) is the user's.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import Distribution
from pathlib import Path
from typing import TextIO

from scripts.installed import installed, normal, records

ROOT = Path(__file__).resolve().parents[1]
PACKAGES_A_RUN = 8  # what an interruption loses at most; each run of pip costs half a second
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--no-color"]
PIP += ["--disable-pip-version-check", "--no-input", "--no-deps"]
LOCAL_BUILD = (
    "setup: a build with a '+' in its version comes from a package index of its own;\n"
    "       docs/install.md says how to name that to pip"
)


class Screen:
    """Lines for a person. On a terminal the line on progress is rewritten in place."""

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.terminal = out.isatty()

    def say(self, line: str) -> None:
        print(("\r\x1b[K" if self.terminal else "") + line, file=self.out, flush=True)

    def step(self, line: str) -> None:
        """A line that the next one replaces where it can."""
        if self.terminal:
            self.rewrite(line)
        else:
            self.say(line)

    def end_step(self) -> None:
        """Leave the last step on the screen."""
        if self.terminal:
            self.out.write("\n")

    def rewrite(self, line: str) -> None:
        """A line that only a terminal is shown."""
        if self.terminal:
            columns = shutil.get_terminal_size().columns
            self.out.write("\r\x1b[K" + line[: columns - 1])
            self.out.flush()


class Pip:
    """Runs pip; its warnings and errors go to the screen, each kind of warning once.

    All of them are in `log`. `temporary` holds pip's downloads while it runs. `lock` stays held
    as long as a pip lives, whatever becomes of us.
    """

    def __init__(self, environment: Path, lock: TextIO, screen: Screen) -> None:
        self.lock, self.screen = lock, screen
        self.log = environment / "setup.log"
        self.log.write_text("")
        self.temporary = environment / "tmp"
        self.shown: set[str] = set()

    def install(self, arguments: list[str], progress: Callable[[int], str]) -> int:
        """pip's exit code. `progress` says how far it is, given the bytes pip is fetching."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir()
        with self.log.open("a") as written, self.log.open() as read:
            read.seek(0, os.SEEK_END)
            with subprocess.Popen(
                [*PIP, *arguments],
                stdout=written,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(self.temporary)},
                pass_fds=[self.lock.fileno()],
            ) as process:
                self._follow(process, read, progress)
        shutil.rmtree(self.temporary, ignore_errors=True)
        return process.returncode

    def _follow(
        self, process: subprocess.Popen[bytes], read: TextIO, progress: Callable[[int], str]
    ) -> None:
        ended = False
        while not ended:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
                ended = True
            for line in read:
                self._show(line.rstrip("\n"))
            self.screen.rewrite(progress(tree_bytes(self.temporary)))

    def _show(self, line: str) -> None:
        kind = " ".join(line.split()[:2])
        if not line.startswith("WARNING: "):
            self.screen.say(line)
        elif kind not in self.shown:
            self.shown.add(kind)
            self.screen.say(f"{line}\n  (others of its kind go to {os.path.relpath(self.log)})")


def tree_bytes(folder: Path) -> int:
    """Bytes of the files below `folder`; files that go meanwhile count nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


def size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


def read_pins(locks: list[Path]) -> dict[str, str]:
    """Name -> version of what the locks pin."""
    lines = [line.strip() for lock in locks for line in lock.read_text().splitlines()]
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normal(name): version for name, version in pins}


def missing(pins: dict[str, str], found: dict[str, Distribution]) -> list[str]:
    """What to install, as name==version. Builds from an index of their own, which the user may
    have to name first, come before the rest is fetched."""
    names = [name for name in pins if name not in found or found[name].version != pins[name]]
    return [f"{n}=={pins[n]}" for n in sorted(names, key=lambda n: ("+" not in pins[n], n))]


def runs(todo: list[str]) -> list[list[str]]:
    """`todo` in pieces of PACKAGES_A_RUN, each build from an index of its own by itself."""
    alone = [[package] for package in todo if "+" in package]
    rest = todo[len(alone) :]
    return alone + [rest[i : i + PACKAGES_A_RUN] for i in range(0, len(rest), PACKAGES_A_RUN)]


class Progress:
    """What has been installed so far, and what pip is at."""

    def __init__(self, total: int, site: Path) -> None:
        self.total = total
        self.site = site
        self.done = 0
        self.num_bytes = 0
        self.names: list[str] = []
        self.begun_s = time.monotonic()

    def begin(self, names: list[str]) -> None:
        self.names = names

    def end(self) -> None:
        for name in self.names:
            for package in Distribution.discover(name=name, path=[str(self.site)]):
                self.num_bytes += sum(num_bytes or 0 for _, num_bytes in records(package))
        self.done += len(self.names)
        self.names = []

    def line(self, fetched_bytes: int = 0) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self.begun_s), 60)
        count = f"{self.done} of {self.total} packages, {size(self.num_bytes)}"
        now = f" | {self.names[0]} .. {self.names[-1]}" if self.names else ""
        if fetched_bytes >= 1e6:
            now = f" | fetching {size(fetched_bytes)}{now}"
        return f"setup: {count}, {minutes} min {seconds:02d} s{now}"


def install_pins(pins: dict[str, str], site: Path, pip: Pip) -> int:
    """0, or the exit code of the pip that failed."""
    todo = missing(pins, installed(site))
    if not todo:
        return 0
    pip.screen.say(f"setup: {len(todo)} of {len(pins)} packages are missing")
    progress = Progress(len(todo), site)
    for packages in runs(todo):
        progress.begin([package.partition("==")[0] for package in packages])
        if code := pip.install(packages, progress.line):
            pip.screen.say(f"setup: pip could not install {', '.join(packages)}")
            if "+" in packages[0]:
                pip.screen.say(LOCAL_BUILD)
            return code
        progress.end()
        pip.screen.step(progress.line())
    pip.screen.end_step()
    return 0


@contextmanager
def one_at_a_time(environment: Path, say: Callable[[str], object]) -> Iterator[TextIO]:
    """The environment's lock, held; another set-up, or a pip that outlived one, is waited for."""
    with (environment / "setup.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"setup: waiting for another set-up of {environment}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def install(locks: list[Path], environment: Path, screen: Screen) -> int:
    """0, or the exit code of the pip that failed."""
    with one_at_a_time(environment, screen.say) as lock:
        site = Path(sysconfig.get_path("purelib"))
        if "pip" not in installed(site):
            screen.step("setup: installing pip")
            ensurepip = [sys.executable, "-Im", "ensurepip", "--upgrade"]
            subprocess.run(ensurepip, check=True, stdout=subprocess.DEVNULL)
        pip = Pip(environment, lock, screen)
        if code := install_pins(read_pins(locks), site, pip):
            return code
        screen.say("setup: installing ConServe itself")
        return pip.install(["--no-build-isolation", "-e", str(ROOT)], lambda _: "")


def main() -> int:
    screen = Screen(sys.stdout)
    try:
        code = install([Path(lock) for lock in sys.argv[1:]], Path(sys.prefix), screen)
    except KeyboardInterrupt:
        code = 130
    if code:
        screen.say("setup: not finished; what is installed stays, and make setup goes on from here")
    return code


if __name__ == "__main__":
    sys.exit(main())
