"""The picture of a plan: online rate, harvest, and each job's progress against its deadline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from conserve.sim.planning import PlanFile, PlanOutcome


def draw(path: Path, plan: PlanFile, outcome: PlanOutcome) -> None:
    """Write `path` in the format of its suffix. Raises ValueError for one it does not know."""
    slots = outcome.slots
    hours = np.arange(len(slots.rates_rps)) * slots.slot_s / 3600
    figure = Figure(figsize=(8, 6), layout="constrained")
    online, offline = figure.subplots(2, 1, sharex=True)
    online.plot(hours, slots.rates_rps, color="#c0504d")
    online.set_ylabel("online requests/s")
    online.set_title(f"{plan.replicas} x {plan.profile}", fontsize=10)
    both = slots.harvested_tps + slots.spare_tps
    offline.fill_between(hours, slots.harvested_tps, color="#2a6fbb", label="done")
    offline.fill_between(hours, slots.harvested_tps, both, color="#c9dcf0", label="spare")
    for job in slots.jobs:
        colour = "#2e8b57" if job.on_time else "#c0504d"
        offline.axvline(job.job.deadline_s / 3600, color=colour, ls="--", lw=1)
        end = "not done" if job.finish_s is None else f"done {job.finish_s / 3600:.1f} h"
        offline.annotate(
            f"{job.job.name}: {end}",
            (job.job.deadline_s / 3600, 0.02),
            xycoords=("data", "axes fraction"),
            rotation=90,
            fontsize=8,
            ha="right",
        )
    offline.set_ylabel("offline tokens/s")
    offline.set_xlabel("hours")
    offline.set_xlim(0, plan.hours)
    offline.legend(fontsize=8, frameon=False, loc="upper right")
    for axis in (online, offline):
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
