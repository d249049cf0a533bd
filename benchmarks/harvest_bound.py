"""How near the policy comes to the best mix of prompts and decodes: docs/design/policy.md's table.

    python benchmarks/harvest_bound.py --trace PATH_OF_AzureLLMInferenceTrace_conv.csv

simulates `paper-8b` (or --scenario) at several values of `chat_slowdown`, and solves the linear
program of that page for each run: its steps beside chat, their online parts, the time without
chat and the mean lengths of documents are as they were in the run, and offline work may be mixed
in as it likes. Without vLLM and
without a GPU; some two minutes on one core.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from conserve.bench.selection import scenario_file
from conserve.core.latency import LatencyModel
from conserve.core.plan import Mode
from conserve.core.settings import PolicySettings
from conserve.metrics import RequestRecord
from conserve.sim.arms import BOUND, Arm, arm_named
from conserve.sim.cost import profiled_model
from conserve.sim.profiles import load_profile
from conserve.sim.run import simulate
from conserve.sim.step import Step
from conserve.workload import build_workload, load_scenario

ROOT = Path(__file__).parent
SLOWDOWNS = (1.1, 1.2, 1.33, 1.5, 1.6, 2.0, 3.0)
GRID = 2000


@dataclass(frozen=True)
class Documents:
    """Means over offline requests, weighted as their tokens are."""

    prompt: float
    output: float
    prompt_context: float
    """KV tokens that a prompt's token reads."""
    decode_context: float

    @classmethod
    def of(cls, ended: list[RequestRecord]) -> Documents:
        lengths = [(r.num_prompt_tokens, r.num_output_tokens) for r in ended]
        prompts, outputs = (float(sum(column)) for column in zip(*lengths, strict=True))
        read = sum(prompt * prompt / 2 for prompt, _ in lengths)
        decoded = sum(output * (prompt + output / 2) for prompt, output in lengths)
        num = len(lengths)
        return cls(prompts / num, outputs / num, read / prompts, decoded / outputs)


def best_requests(
    steps: list[Step], slowdown: float, documents: Documents, model: LatencyModel, most_tokens: int
) -> float:
    """The most offline requests that these steps could have computed: the linear program's value.

    For x prompt tokens in each step beside chat, decodes take what is left of its room; steps
    without chat then compute of both what the mix lacks, with their fixed cost spread over
    `most_tokens`. The best x is looked for on a grid.
    """
    beside = [step for step in steps if step.mode is Mode.ONLINE_DECODE]
    alone_s = sum(model.predict_s(step.online_shape) for step in beside)
    free_s = sum(step.end_s - step.start_s for step in steps if step.mode is Mode.OFFLINE)
    room_s = (slowdown - 1) * alone_s / len(beside)
    num_free = model.knee - sum(step.online_shape.num_tokens for step in beside) / len(beside)
    attention_s = model.per_activation + model.per_pair * documents.prompt_context
    decode_s = model.per_activation + model.per_decode
    decode_s += model.per_context * documents.decode_context
    token_s = model.per_token + model.fixed / most_tokens
    prompt_s, output_s = attention_s + token_s, decode_s + token_s
    best = 0.0
    for point in range(GRID + 1):
        prompts = point * 2 * model.knee / GRID
        left_s = room_s - attention_s * prompts - model.per_token * max(0.0, prompts - num_free)
        if left_s < 0:
            break
        num_prompt = prompts * len(beside)
        num_output = left_s / decode_s * len(beside)
        spent_s = free_s + prompt_s * num_prompt + output_s * num_output
        requests = spent_s / (prompt_s * documents.prompt + output_s * documents.output)
        lacking = min(
            requests * documents.prompt - num_prompt, requests * documents.output - num_output
        )
        if lacking >= 0:
            best = max(best, requests)
        else:
            best = max(best, min(num_prompt / documents.prompt, num_output / documents.output))
    return best


def main(
    trace: Annotated[Path, typer.Option(help="The Azure conversation trace's CSV.")],
    scenario: str = "paper-8b",
    profile: str = "h100/llama-3.1-8b",
    duration_s: float = 1200.0,
) -> None:
    load = load_scenario(scenario_file(scenario))
    # Long beside what lies half-computed in KV memory at either end.
    load = load.model_copy(update={"duration_s": duration_s, "lead_in_s": duration_s / 10})
    workload = build_workload(load, load.seeds[0], {"azure-conv": trace})
    machine = load_profile(profile)
    model = profiled_model(machine.cost, machine.machine.max_step_tokens)

    def finished(arm: Arm, kept: list[Step]) -> list[RequestRecord]:
        """Offline requests that ended in the window."""
        targets = load.targets.targets()
        outcome = simulate(workload, arm, machine, targets, load.window, on_step=kept.append)
        offline = [r for r in outcome.records if not r.online and r.finished]
        return [r for r in offline if 0 <= r.token_times_s[-1] < duration_s]

    fcfs = len(finished(arm_named(BOUND), []))
    rows = []
    for slowdown in SLOWDOWNS:
        steps: list[Step] = []
        arm = Arm("conserve", "", settings=PolicySettings(chat_slowdown=slowdown))
        ended = finished(arm, steps)
        share = len(ended) / fcfs
        during = [s for s in steps if 0 <= s.start_s < duration_s]
        most = best_requests(
            during, slowdown, Documents.of(ended), model, machine.machine.max_step_tokens
        )
        rows.append({"chat_slowdown": slowdown, "harvested": share, "best": most / fcfs})
        print(f"{slowdown:5g}  harvested {share:.3f}  best mix {most / fcfs:.3f}", flush=True)
    found = {"scenario": scenario, "profile": profile, "duration_s": duration_s, "rows": rows}
    (ROOT / "results" / "harvest-bound.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
