"""Real engines with our scheduler, one family after the other in one process.

    python -m tests.models.play '{family: folder of its model, ...}' RESULT [careless]

Each request is asked alone. Then all are asked again, as offline requests, in so few blocks that
bursts of online ones displace them, with rank 0 stopping steps at layers drawn at random. With
`careless`, once more for each negative control. What came of each family goes into the result file.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from tests.models.asking import Asking
from tests.models.careless import CONTROLS
from tests.models.checks import answered_as_alone
from tests.models.engine import make_engine
from tests.models.family import ON, Asked, Family
from tests.models.registry import FAMILIES
from tests.models.stopping import NUM_STOPS, stop_at_random

BURST = 3
CARELESS_ROUNDS = 8


@dataclass(frozen=True)
class Pace:
    """How a round goes."""

    stops: float
    """The share of safepoints at which a step is stopped."""
    every: int
    """Steps from when a burst of online requests has been answered to the next one."""
    most_steps: int
    """After which a round has no end."""


WRITING = Pace(stops=0.03, every=30, most_steps=4_000)
POOLING = Pace(stops=0.15, every=2, most_steps=400)


def alone(asking: Asking, requests: list[Asked]) -> None:
    for i, asked in enumerate(requests):
        asking.ask(f"{i}/alone", asked, online=True)
        asking.finish()


def together(asking: Asking, requests: list[Asked], pace: Pace) -> None:
    for i, asked in enumerate(requests):
        asking.ask(f"{i}/offline", asked, online=False)
    coming, quiet_steps = cycle(enumerate(requests)), 0
    for num_steps in range(pace.most_steps):
        if not asking.open["offline"]:
            break
        quiet_steps = 0 if asking.open["online"] else quiet_steps + 1
        if quiet_steps == pace.every:
            for i, asked in islice(coming, BURST):
                asking.ask(f"{i}/online/{num_steps}", asked, online=True)
        asking.step()
    else:
        raise RuntimeError(f"no end after {pace.most_steps} steps")
    asking.finish()


def played(family: Family, model: Path, pace: Pace, *, careless: bool) -> dict[str, Any]:
    engine = make_engine(family, str(model))
    asking, requests = Asking(engine, family.task), family.ask(model)
    free = [asking.free_blocks()]
    alone(asking, requests)
    asking.start_anew()
    counts_alone = dict(asking.counts)
    asking.counts.clear()
    NUM_STOPS.clear()
    together(asking, requests, pace)
    asking.settle(requests)
    free.append(asking.free_blocks())
    result = {**seen(engine, asking), "stops": len(NUM_STOPS), "free_blocks": free}
    result["counts_alone"] = counts_alone
    if careless:
        result["careless"] = {
            name: carelessly(asking, name, family, requests, pace)
            for name in CONTROLS
            if getattr(family, name) == ON
        }
    engine.engine_core.shutdown()
    return result


def seen(engine: Any, asking: Asking) -> dict[str, Any]:
    """What an engine that is still there shows."""
    from conserve.engine.abilities import abilities
    from conserve.engine.steps import GENERIC_MODEL

    scheduler = asking.scheduler
    checkpointer = scheduler.checkpointer
    return {
        "answers": dict(asking.answers),
        "counts": dict(asking.counts),
        "cut": sorted(asking.cut),
        "start": {one.name: one.why_off or ON for one in abilities(scheduler)},
        "num_groups": len(scheduler.kv_cache_config.kv_cache_groups),
        "kept_of_offline": checkpointer.pool.num_slots_of(online=False),
        "profiled": scheduler.experience.model != GENERIC_MODEL,
        "chunked": scheduler.vllm_config.scheduler_config.enable_chunked_prefill,
    }


def carelessly(
    asking: Asking, name: str, family: Family, requests: list[Asked], pace: Pace
) -> dict[str, Any]:
    """The answers of a round with this control that went wrong, or how it ended. Not every round
    does: what a careless stop leaves unwritten may have been written there before."""
    try:
        with CONTROLS[name]():
            for _ in range(CARELESS_ROUNDS):
                asking.start_anew()
                together(asking, requests, pace)
                if not answered_as_alone(asking.answers, exactly=family.task == "generate"):
                    break
    except Exception as error:
        return {"ended": repr(error)}
    return {"answers": asking.answers}


def main(models: dict[str, str], result: Path, *careless: str) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    results: dict[str, Any] = {}
    for name, model in models.items():
        family = FAMILIES[name]
        pace = WRITING if family.task == "generate" else POOLING
        try:
            with stop_at_random(pace.stops):
                results[name] = played(family, Path(model), pace, careless=bool(careless))
        except Exception:
            results[name] = {"ended": traceback.format_exc()}
        ensure_kv_transfer_shutdown()
        cleanup_dist_env_and_memory()
        result.write_text(json.dumps(results))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
