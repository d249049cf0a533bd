"""What came of a step's drafts: those that were wrong are computed for nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from conserve.engine.stats import EngineStats
from conserve.engine.steps import StepRecord
from conserve.engine.tracker import RequestTracker


def settle(
    scheduler_output: Any,
    model_runner_output: Any,
    steps: Iterable[StepRecord],
    tracker: RequestTracker,
    stats: EngineStats,
    num_sampled: int = 1,
) -> dict[str, int]:
    """Count the drafts of a step that ran to its end, and return how many of each request were
    refused. `steps` are this one and those scheduled since, which took them for right: their
    requests end as many tokens sooner, in the blocks that they were given. `num_sampled`: tokens
    of a request and step beside its drafts; 0 of a canvas, which is all drafts."""
    refused = {}
    for name, num_drafts, num_right in _judged(scheduler_output, model_runner_output, num_sampled):
        tracker.drafted(name, num_drafts, num_right, stats)
        if num_right == num_drafts:
            continue
        refused[name] = num_drafts - num_right
        for step in steps:
            if name in step.ends:
                tracker.reached(name, step.ends[name])
                step.ends[name] -= refused[name]
    return refused


def _judged(
    scheduler_output: Any, model_runner_output: Any, num_sampled: int
) -> Iterator[tuple[str, int, int]]:
    """(request, its drafts, those of them that were right). A step of a prompt's part has none."""
    rows, sampled = model_runner_output.req_id_to_index, model_runner_output.sampled_token_ids
    for name, drafts in scheduler_output.scheduled_spec_decode_tokens.items():
        tokens = sampled[rows[name]] if sampled else ()
        if tokens or not num_sampled:
            yield name, len(drafts), max(0, len(tokens) - num_sampled)
