"""What a run on a GPU found, from whatever of it came back.

    python benchmarks/gpu/report.py out/gpu                         # writes report.md, profile.toml
    python benchmarks/gpu/report.py out/gpu --page README.md        # and the tables of its marks
    python benchmarks/gpu/report.py out/gpu --replace               # and the simulator's constants

The folder is run.py's, or its bundle unpacked. A part that is not there is named, and its rows are
left out.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from load_rows import load_rows, validation
from measured import (
    KINDS,
    Folder,
    answered,
    fitted_gpu,
    percentiles,
    prefill_s,
    replace_constants,
    simulated,
    write_profile,
)

from conserve.bench.report.write import write_report
from conserve.core.latency import StepShape
from conserve.sim import profiles

PARTS = ("environment", "answers", "response", "overhead", "steps", "belief", "copies")
GPUS = Path(profiles.__file__).with_suffix("") / "gpus.toml"


SHORT_STEP = 2048
"""Tokens. One layer of a longer step takes longer than a stop is to take."""


class Row(NamedTuple):
    """One figure: what was aimed at, what the paper has, what the simulator had, what it is."""

    what: str
    aim: str
    paper: str
    simulator: str
    measured: str


MARKS: dict[str, Callable[[Row], bool]] = {
    "gpu": lambda row: True,
    "gpu aims": lambda row: row.aim != "-",
}
"""What a page gets between <!-- MARK --> and <!-- /MARK -->: all rows, or those with an aim."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--page", type=Path, action="append", default=[], help="with marks: see MARKS"
    )
    parser.add_argument("--replace", action="store_true", help=f"the constants in {GPUS.name}")
    options = parser.parse_args()
    folder = Folder(options.folder)
    found = rows(folder)
    text = "\n".join([*heading(folder), "", *markdown(found), "", *details(folder)])
    (folder.path / "report.md").write_text(text + "\n")
    if profile := folder.profile:
        write_profile(profile, folder.path / "profile.toml")
    for page in options.page:
        page.write_text(filled_in(page.read_text(), found))
    if options.replace and (gpu := fitted_gpu(folder)):
        replace_constants(GPUS, folder.gpu, gpu)
    print(text)


def heading(folder: Folder) -> Iterator[str]:
    found = folder.part("environment") or {}
    yield "# One GPU, measured"
    yield ""
    machine, versions = found.get("machine", {}), found.get("versions", {})
    yield f"{machine.get('accelerator', 'unknown')}, {machine.get('cpu')}, {found.get('started')}."
    yield f"{', '.join(f'{name} {version}' for name, version in versions.items())}."
    yield f"`python benchmarks/gpu/run.py {' '.join(found.get('flags', []))}`"
    if missing := [name for name in PARTS if folder.part(name) is None]:
        yield f"Not measured, or not brought back: {', '.join(missing)}."


def rows(folder: Folder) -> list[Row]:
    parts = (starts, same_texts, response, overhead, steps, belief, copies)
    found = [row for part in parts for row in part(folder)]
    return found + [Row(*row) for row in load_rows(folder)]


def markdown(found: list[Row]) -> list[str]:
    lines = ["| what | aim | paper | simulator | measured |", "| --- | --- | --- | --- | --- |"]
    return lines + [f"| {' | '.join(row)} |" for row in found]


def starts(folder: Folder) -> Iterator[Row]:
    found = folder.part("answers")
    if found:
        ready = f"{found['ready_s']:.0f} s" if "ready_s" in found else "never"
        yield Row("a server as it comes: ready after, kinds of requests answered", "all", "-", "-",
                  f"{ready}, {len(answered(found))} of {len(KINDS)}")  # fmt: skip


def same_texts(folder: Folder) -> Iterator[Row]:
    for file in sorted((folder.path / "same-output").glob("*.json")):
        found: dict[str, Any] = Folder(file.parent).part(file.stem) or {}
        yield Row(
            f"texts as alone: with stops, without ({file.stem}, {found['num_stops']} stops, "
            f"{found['restored_tokens']} tokens restored)",
            "equal", "-", "-",
            f"{found['equal_with_stops']}, {found['equal_without_stops']} of {found['requests']}",
        )  # fmt: skip


def response(folder: Folder) -> Iterator[Row]:
    stops = (folder.part("response") or {}).get("stops", [])
    for size in sorted({stop["num_tokens"] for stop in stops}):
        of_size = [stop for stop in stops if stop["num_tokens"] == size]
        idle, unwound = (
            percentiles([1000 * stop[key] for stop in of_size]) for key in ("idle_s", "unwound_s")
        )
        values = f"{idle['p50']:.1f}, {idle['p99']:.1f}, {idle['max']:.1f} ms"
        what = f"stop to idle device, steps of {size} tokens, P50, P99, most of {len(of_size)}"
        aim = "P99 under 5 ms" if size <= SHORT_STEP else "-"
        yield Row(what, aim, "13 ms at most (70B, 4 GPUs)", "-", values)
        yield Row(f"stop to unwound, steps of {size} tokens, P99", "-", "-", "-",
                  f"{unwound['p99']:.1f} ms")  # fmt: skip


def overhead(folder: Folder) -> Iterator[Row]:
    for one in (folder.part("overhead") or {}).get("pairs", []):
        chosen = "as chosen" if one["chosen"] else "forced"
        yield Row(
            f"being stoppable, {one['num_tokens']} tokens, looks every {one['every']} layers "
            f"({chosen}), {len(one['plain_s'])} pairs",
            "under 0.5 %", "1.1 % (70B, 4 GPUs)", "-", f"{one['median_overhead_ratio']:+.2%}",
        )  # fmt: skip


def steps(folder: Folder) -> Iterator[Row]:
    profile, found = folder.profile, folder.part("steps")
    if not found:
        return
    off = "the model's mean error on steps it was not fitted to"
    if not profile:
        yield Row(off, "under 10 %", "-", "-", f"no model: {found.get('fit', 'cut off')}")
        return
    before = simulated(folder)
    for context, paper in ((0, "51 ms"), (40_000, "124 ms")):
        what = f"2,048 tokens behind {context:,}, by the fitted model"
        times = [f"{1000 * prefill_s(one, 2048, context):.1f} ms" for one in (before, profile)]
        yield Row(what, "-", paper, *times)
    for count in (16, 128):
        shape = StepShape()
        for _ in range(count):
            shape.add_decode(1, 1024)
        times = [f"{1000 * one.cost.predict_s(shape):.1f} ms" for one in (before, profile)]
        yield Row(f"{count} decodes behind 1,024, by the fitted model", "-", "-", *times)
    yield Row(off, "under 10 %", "-", "-", f"{found['mean_error_held_out']:.1%}")


def belief(folder: Folder) -> Iterator[Row]:
    found = folder.part("belief")
    if found and found["num_steps"]:
        names = ("p10_ratio", "median_ratio", "p90_ratio")
        values = ", ".join(f"{found[name]:.2f}" for name in names)
        what = f"what the engine believes of {found['num_steps']} steps over the device's own"
        yield Row(f"{what}, P10, P50, P90", "1", "-", "-", values)


def copies(folder: Folder) -> Iterator[Row]:
    found = folder.part("copies")
    if not found:
        return
    for one in found["checkpoints"]["copies"][-6:]:
        if one["scattered"]:
            kind = "store" if one["store"] else "restore"
            kind += ", waited for" if one["waited_for"] else ""
            speeds = [run["bytes_per_s"] for run in one["runs"]]
            waits = 1000 * median(run["wait_s"] for run in one["runs"])
            held = f", forward held {waits:.2f} ms" if one["waited_for"] else ""
            yield Row(f"{one['num_blocks']} blocks, {kind}", "-", "37 GB/s",
                      f"{simulated(folder).machine.link_bytes_per_s / 1e9:.0f} GB/s",
                      f"{median(speeds) / 1e9:.1f} GB/s{held}")  # fmt: skip
    for one in found.get("effect", []):
        slower = one["slowdown"]
        yield Row(
            f"steps beside copies {one['direction'].replace('_', ' ')}: prefill, decode",
            "under 2 %", "-", "0", f"{slower['prefill']:+.1%}, {slower['decode']:+.1%}",
        )  # fmt: skip


def details(folder: Folder) -> Iterator[str]:
    if gpu := fitted_gpu(folder):
        yield "Constants of the simulator's GPU, fitted to these steps (`--replace` puts them in):"
        yield ""
        known = simulated(folder).cost
        for name in ("matmul_efficiency", "attention_efficiency", "bytes_efficiency", "step_s",
                     "link_bytes_per_s", "safepoint_s"):  # fmt: skip
            was = getattr(getattr(known, "gpu", None), name, 0.0)
            yield f"- `{name}`: {was:.4g}, measured {getattr(gpu, name):.4g}"
        yield ""
    yield from validation(folder)
    if any((folder.path / "load").glob("records/*/*.jsonl.gz")):
        write_report(folder.path / "load")
        yield ""
        yield "All figures of the arms: [load/report.md](load/report.md)."


def filled_in(text: str, found: list[Row]) -> str:
    """A page with the rows between its marks. Exits where it has none of them."""
    changed = 0
    for mark, wanted in MARKS.items():
        text, times = _between(mark, markdown([row for row in found if wanted(row)]), text)
        changed += times
    if not changed:
        sys.exit(f"--page: no {' or '.join(f'<!-- {mark} -->' for mark in MARKS)} in it")
    return text


def _between(mark: str, lines: list[str], text: str) -> tuple[str, int]:
    """The page with these lines between the mark and its end, and how often it has the mark."""
    block = "\n".join(["", *lines, ""])
    pattern = rf"(<!-- {mark} -->).*?(<!-- /{mark} -->)"
    return re.subn(pattern, lambda marks: marks[1] + block + marks[2], text, flags=re.DOTALL)


if __name__ == "__main__":
    main()
