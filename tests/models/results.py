"""What came of the families that have played, kept in `results.json` beside this file:
docs/models.md is made of it (`page.py`)."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

from tests.models.family import Family

FILE = Path(__file__).with_name("results.json")
KEEP = "CONSERVE_KEEP_RESULTS"
"""Set in the environment by `make matrix`: what comes of a family is kept."""

Row = dict[str, Any]


def read() -> dict[str, Any]:
    """`vllm` (version), `processor`, and of each family a row (`families`)."""
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def expected_row(family: Family) -> Row:
    """What the registry says will come of it."""
    if family.refusal:
        return {"layers": family.layers, "refusal": family.refusal}
    return {
        "layers": family.layers,
        "num_groups": family.num_groups,
        "cuts_prompts": family.cuts_prompts,
        "stops": family.stops,
        "checkpoints": family.checkpoints,
    }


def row_of(family: Family, result: dict[str, Any]) -> Row:
    """What came of it."""
    if family.refusal:
        return {"layers": family.layers, "refusal": family.refusal}
    return {
        "layers": family.layers,
        "num_groups": result["num_groups"],
        "cuts_prompts": result["chunked"],
        "stops": result["start"]["stops"],
        "checkpoints": result["start"]["checkpoints"],
    }


def keep(name: str, family: Family, result: dict[str, Any]) -> None:
    """Write this family's row, and with what it was made."""
    import vllm

    kept = read() if FILE.exists() else {"families": {}}
    rows = {**kept["families"], name: row_of(family, result)}
    told = {"vllm": vllm.__version__, "processor": processor(), "families": rows}
    FILE.write_text(json.dumps(told, indent=1) + "\n")


def processor() -> str:
    """The kind of processor, as far as vLLM's kernels tell kinds apart."""
    import torch

    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
