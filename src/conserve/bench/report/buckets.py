"""Buckets of a server's histogram, from the samples of a run."""

from __future__ import annotations

import re
from itertools import pairwise

from conserve.bench.store import Run

LABELS = re.compile(r"\{(.*)\}")


def buckets_of(run: Run, name: str, label: str = "") -> tuple[list[float], list[float]]:
    """Finite upper bounds, and the observations of each bucket within the window, the one
    without a bound last. `label`: "name=value", of a series that has one; both lists are empty
    where there is no such series."""
    up_to = {}
    for sample in run.counters_end:
        found = LABELS.search(sample)
        if found is None or sample.partition("{")[0] != f"{name}_bucket":
            continue
        labels = found.group(1).split(",")
        bound = next((one.removeprefix("le=") for one in labels if one.startswith("le=")), "")
        if bound and (not label or label in labels):
            up_to[float(bound)] = run.counted(sample) or 0.0
    bounds = sorted(up_to)
    cumulative = [0.0, *(up_to[bound] for bound in bounds)]
    return bounds[:-1], [high - low for low, high in pairwise(cumulative)]
