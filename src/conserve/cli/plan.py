"""`conserve plan`: before deploying, what would be harvested, and would the jobs be on time."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conserve.cli.failures import clear_errors
from conserve.core.snapshot import Targets
from conserve.workload import ScenarioError

if TYPE_CHECKING:
    from conserve.sim.planning import PlanFile, PlanOutcome


def plan(
    file: Annotated[Path | None, typer.Argument(help="A plan, see docs/simulator.md.")] = None,
    trace: Annotated[
        list[str] | None,
        typer.Option(help="PATH of the trace that the plan names, or NAME=PATH for each."),
    ] = None,
    tbt_ms: Annotated[
        str | None, typer.Option(help="Try these TBT targets too, with commas: how tight can I go?")
    ] = None,
    ttft_ms: Annotated[str | None, typer.Option(help="Try these TTFT targets too.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (.png, .svg) here.")] = None,
    curve: Annotated[
        Path | None,
        typer.Option(
            help="Also try each --chat-slowdown, and write here (.png) what offline work gets over "
            "how much longer than alone chat waits."
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            help="Write a page (.html) with sliders over many machines, loads and settings here; "
            "needs no plan."
        ),
    ] = None,
) -> None:
    """Say how much offline work fits beside an online service, and when each job is done.

    One replica is simulated in full at several online rates; the fleet's day is then put
    together from those. Needs no GPU and no vLLM.
    """
    from conserve.bench.selection import trace_paths
    from conserve.sim.own_targets import describe, with_targets
    from conserve.sim.planning import load_plan, work_out
    from conserve.sim.profiles import load_profile

    with clear_errors("plan", ValueError):
        if page:
            _write_page(page)
        if file is None:
            if page:
                return
            raise ScenarioError("FILE: name a plan, or --page out.html for a page that needs none")
        given = load_plan(file)
        machine = load_profile(given.profile)
        asked = with_targets(given, machine)
        own = asked.targets.targets()
        # All that may be wrong is found before minutes of simulation.
        others = [replace(own, tbt_s=ms / 1000) for ms in _numbers(tbt_ms, "--tbt-ms")]
        others += [replace(own, ttft_s=ms / 1000) for ms in _numbers(ttft_ms, "--ttft-ms")]
        for picture, flag in ((plot, "--plot"), (curve, "--curve")):
            _check_picture(picture, flag)
        for line in describe(machine) if asked is not given else ():
            typer.echo(line)
        traces = trace_paths(asked.trace_names(), trace or [])
        outcome = work_out(asked, traces, own)
        for line in _lines(asked, outcome):
            typer.echo(line)
        if others:
            typer.echo("\nother targets:")
            for targets in (own, *others):
                done = outcome if targets is own else work_out(asked, traces, targets)
                typer.echo(_one_line(done))
        if plot:
            from conserve.sim.planplot import draw

            draw(plot, asked, outcome)
        if curve:
            _draw_curve(curve, asked, traces, own)


def _write_page(path: Path) -> None:
    from conserve.sim.planner.one_file import one_file

    path.write_text(one_file(), encoding="utf-8")
    typer.echo(f"open {path} in a browser")


def _draw_curve(path: Path, asked: PlanFile, traces: dict[str, Path], targets: Targets) -> None:
    from conserve.bench.report.curve import Curve, draw_curves
    from conserve.sim.curve import curve_runs

    found = Curve.of_summaries(curve_runs(asked, traces, targets))
    typer.echo(
        f"\none replica at the mean online rate beside {asked.jobs[0].name}, by --chat-slowdown:"
    )
    for line in found.lines():
        typer.echo(f"  {line}")
    if not draw_curves(path, [found]):
        raise ScenarioError("--curve: nothing to compare with: the plan has no online requests")


def _numbers(text: str | None, flag: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",")] if text else []
    except ValueError:
        raise ScenarioError(f"{flag}: {text!r} is no list of numbers like 50,75,100") from None
    if bad := [number for number in found if not 0 < number < inf]:
        raise ScenarioError(f"{flag}: {bad[0]:g} is no number of milliseconds above 0")
    return found


def _check_picture(path: Path | None, flag: str) -> None:
    """Raises ScenarioError, and OSError where its folder is none."""
    if path is None:
        return
    from matplotlib.figure import Figure

    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise ScenarioError(f"{flag}: {path} is no picture: name one that ends in .png or .svg")
    if not path.parent.is_dir():
        code = errno.ENOTDIR if path.parent.exists() else errno.ENOENT
        raise OSError(code, os.strerror(code), str(path))


def _lines(asked: PlanFile, outcome: PlanOutcome) -> list[str]:
    slots = outcome.slots
    seconds = len(slots.rates_rps) * slots.slot_s
    could = float((slots.harvested_tps + slots.spare_tps).mean())
    idle = float(slots.spare_tps.sum() / max(1e-9, (slots.harvested_tps + slots.spare_tps).sum()))
    lines = [
        f"{asked.replicas} x {asked.profile}, {asked.hours:g} h, online "
        f"{slots.rates_rps.mean():.3g} requests/s on average, {slots.rates_rps.max():.3g} at peak",
        f"targets {outcome.targets.ttft_s * 1e3:g} ms TTFT, {outcome.targets.tbt_s * 1e3:g} ms TBT:"
        f" met by {slots.slo_attainment:.2%} of online requests",
        f"harvest: {could:,.0f} tokens/s ({could * seconds:,.0f} in all), of which the jobs leave"
        f" {idle:.0%} unused",
    ]
    for job in slots.jobs:
        hours = job.job.deadline_s / 3600
        if job.finish_s is not None:
            verdict = "on time" if job.on_time else f"LATE by {job.finish_s / 3600 - hours:.1f} h"
            end = f"done after {job.finish_s / 3600:.1f} h, {verdict}"
        else:
            end = f"NOT DONE: {job.num_done / job.job.num_requests:.0%}"
        done = job.num_done_at_deadline / job.job.num_requests
        lines.append(
            f"  {job.job.name}: {job.job.num_requests:,} requests by {hours:g} h: {end}"
            f" ({done:.0%} at the deadline)"
        )
    lines.append(
        f"a batch cluster of its own would need {outcome.separate_replicas:.2f} replicas more"
    )
    return lines


def _one_line(outcome: PlanOutcome) -> str:
    slots = outcome.slots
    could = float((slots.harvested_tps + slots.spare_tps).mean())
    late = [job.job.name for job in slots.jobs if not job.on_time]
    return (
        f"  TTFT {outcome.targets.ttft_s * 1e3:g} ms, TBT {outcome.targets.tbt_s * 1e3:g} ms:"
        f" met by {slots.slo_attainment:.2%}, harvest {could:,.0f} tokens/s, "
        + (f"late: {', '.join(late)}" if late else "every job on time")
    )
