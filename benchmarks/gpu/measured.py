"""What a run left in its folder, and the simulator's two profiles of it: the engine's own latency
model, and the constants of gpus.toml fitted to the same steps, which hold for other models too."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from conserve.core.latency import LatencyModel, StepShape
from conserve.metrics.percentiles import percentile
from conserve.sim.cost import Machine
from conserve.sim.profiles import Profile, load_profile
from conserve.sim.roofline import Gpu, Roofline

MODEL = "llama-3.1-8b"
FITTED = ("matmul_efficiency", "attention_efficiency", "bytes_efficiency", "step_s")
"""Constants of a GPU that step times tell."""
Samples = list[tuple[StepShape, float]]
KINDS = ("first", "streamed", "offline", "chat")
"""Of requests that answers.py asks."""


def answered(answers: dict[str, Any]) -> list[str]:
    """The kinds that a server answered."""
    return [kind for kind in KINDS if answers.get(kind, {}).get("status") == 200]


def is_answered(answers: dict[str, Any]) -> bool:
    """Whether the server came to its end without an error, and answered everything."""
    return "error" not in answers and answered(answers) == list(KINDS)


def percentiles(values: list[float]) -> dict[str, float]:
    """P50, P99 and the most; of none, none."""
    found = {name: percentile(values, q) for name, q in (("p50", 50), ("p99", 99), ("max", 100))}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Folder:
    """Reads what is there, of a part that was cut off what it had by then; what is not is None."""

    path: Path

    def part(self, name: str) -> dict[str, Any] | None:
        files = [self.path / f"{name}{end}.json" for end in ("", "-unfinished")]
        return next((json.loads(file.read_text()) for file in files if file.is_file()), None)

    @property
    def gpu(self) -> str:
        """As gpus.toml calls it; that of an H100 where there was none."""
        names = str((self.part("environment") or {}).get("nvidia_smi", ""))
        return "h200" if "H200" in names else "h100"

    @property
    def samples(self) -> Samples:
        rows = (self.part("steps") or {}).get("samples", [])
        return [(StepShape(*shape), seconds) for *shape, seconds in rows]

    @property
    def link_bytes_per_s(self) -> float:
        """Of the product's copies to the host, the largest of them."""
        copies = (self.part("copies") or {}).get("checkpoints", {}).get("copies", [])
        stored = [one for one in copies if one["store"] and not one["waited_for"]]
        if not stored:
            return 0.0
        largest = max(stored, key=lambda one: (one["num_blocks"], one["scattered"]))
        return float(median(run["bytes_per_s"] for run in largest["runs"]))

    @property
    def safepoint_s(self) -> float:
        """One look at the stop signal, from steps that looked at every layer; 0: not seen."""
        pairs = [one for one in (self.part("overhead") or {}).get("pairs", []) if not one["chosen"]]
        if not pairs:
            return 0.0
        extra: list[float] = [median(one["watched_s"]) - median(one["plain_s"]) for one in pairs]
        return max(0.0, median(extra) / self._num_layers)

    @property
    def _num_layers(self) -> int:
        return int((self.part("overhead") or {}).get("engine", {}).get("num_layers", 32))

    @property
    def profile(self) -> Profile | None:
        """The measured machine, as `conserve sim run --profile` takes it."""
        steps = self.part("steps")
        if not steps or "model" not in steps:
            return None
        pairs = (self.part("overhead") or {}).get("pairs", [])
        looks = [one["every"] for one in pairs if one["chosen"]]
        machine = Machine(
            **steps["machine"],
            link_bytes_per_s=self.link_bytes_per_s,
            safepoint_s=self.safepoint_s,
            safepoint_layers=max(1, round(median(looks))) if looks else 0,
        )
        return Profile(self.path.name, "measured", machine, LatencyModel(**steps["model"]))


def simulated(folder: Folder) -> Profile:
    """What the simulator has believed of this GPU."""
    return load_profile(f"{folder.gpu}/{MODEL}")


def prefill_s(profile: Profile, num_tokens: int, context: int) -> float:
    shape = StepShape()
    shape.add_prefill(num_tokens, context)
    return profile.cost.predict_s(shape)


def write_profile(profile: Profile, file: Path) -> None:
    """A file for `conserve sim run --profile`, of a profile that a folder gave."""
    assert isinstance(profile.cost, LatencyModel)
    lines = ['about = "measured by benchmarks/gpu"']
    for name, table in (("machine", profile.machine), ("cost", profile.cost)):
        kept = {key: value for key, value in asdict(table).items() if type(value) in (int, float)}
        lines += ["", f"[{name}]", *(f"{key} = {value!r}" for key, value in kept.items())]
    file.write_text("\n".join(lines) + "\n")


def fitted(gpu: Gpu, predictor: Callable[[Gpu], Roofline], samples: Samples) -> Gpu:
    """The GPU whose roofline is nearest to the samples, by the mean of |log(predicted / real)|.

    One constant after another is moved by a factor that shrinks: there are four, and each moves
    its own share of the steps."""

    def off(one: Gpu) -> float:
        roofline = predictor(one)
        return sum(abs(math.log(roofline.predict_s(shape) / s)) for shape, s in samples)

    best, least, factor = gpu, off(gpu), 1.5
    while factor > 1.002:
        tried = [_moved(best, name, by) for name in FITTED for by in (factor, 1 / factor)]
        nearest = min(tried, key=off)
        if off(nearest) < least:
            best, least = nearest, off(nearest)
        else:
            factor = math.sqrt(factor)
    return best


def _moved(gpu: Gpu, name: str, factor: float) -> Gpu:
    most = 1.0 if name.endswith("efficiency") else math.inf
    return replace(gpu, **{name: min(most, getattr(gpu, name) * factor)})


def fitted_gpu(folder: Folder) -> Gpu | None:
    """The measured constants of this GPU; None where no step was measured."""
    known = simulated(folder).cost
    if not folder.samples or not isinstance(known, Roofline):
        return None
    found = fitted(known.gpu, lambda gpu: Roofline(gpu, known.model), folder.samples)
    if folder.link_bytes_per_s:
        found = replace(found, link_bytes_per_s=folder.link_bytes_per_s)
    return replace(found, safepoint_s=folder.safepoint_s) if folder.safepoint_s else found


def replace_constants(file: Path, name: str, gpu: Gpu) -> None:
    """Put the measured constants into [name] of gpus.toml, everything else as it is."""
    head, table, rest = re.split(rf"(?m)^(\[{name}\]\n)", file.read_text(), maxsplit=1)
    own, mark, others = rest.partition("\n[")
    for field in (*FITTED, "link_bytes_per_s", "safepoint_s"):
        own = re.sub(rf"(?m)^{field} = .*$", f"{field} = {getattr(gpu, field):.4g}", own)
    told = '"measured by benchmarks/gpu; see benchmarks/results/gpu"'
    own = re.sub(r"(?m)^(link_source|safepoint_source) = .*$", rf"\1 = {told}", own)
    file.write_text(head + table + own + mark + others)
