"""What a family of models is to these tests: how its model is made, what it is asked, and what
ConServe is to do with it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.stops.tiny_llama import random_text

NUM_PROMPTS = 12
MAX_MODEL_LEN = 512
ON = "on"

Asked = dict[str, Any]
"""What vLLM's `add_request` takes for one request, its prompt first of all."""


def texts(
    model: Path, least: int = 150, most: int = 450, num_prompts: int = NUM_PROMPTS
) -> list[Asked]:
    """Prompts of lengths drawn at random; every character is a token."""
    chance = random.Random(1)
    return [
        {"prompt": random_text(chance, chance.randrange(least, most))} for _ in range(num_prompts)
    ]


@dataclass(frozen=True)
class Family:
    """One family. `play.py` plays it, `checks.py` says what must hold."""

    layers: str
    """In the words of docs/models.md: how its layers keep what they remember."""
    make: Callable[[Path], Path]
    """(folder) -> the folder with a small random model in it. Weights are so large that outputs
    vary (`weights.py`)."""
    num_groups: int = 1
    """vLLM's groups of layers that keep KV alike."""
    num_blocks: int = 20
    """KV memory: so few blocks that a burst displaces offline requests."""
    stops: str = ON
    """Or why its steps are not stopped between layers, in the words in which start says so."""
    checkpoints: str = ON
    """Or why its displaced requests compute again, likewise."""
    task: str = "generate"
    """Or what a pooling model is asked for, in vLLM's words."""
    cuts_prompts: bool = True
    """Whether vLLM computes a prompt in several steps."""
    options: dict[str, Any] = field(default_factory=dict)
    """What vLLM is told beside what all are told (`engine.py`)."""
    speculation: Callable[[str], dict[str, Any]] | None = None
    """(folder of the model) -> how tokens are speculated, in vLLM's words."""
    ask: Callable[[Path], list[Asked]] = texts
    """(folder of the model) -> what each request asks."""
    states: str = "none"
    """`ON` where a stop puts recurrent state back, which a negative control leaves out."""
    always: bool = False
    """Whether `make test` plays it, too; `make matrix` plays all."""
    refusal: str = ""
    """vLLM's own words, if it cannot run the model here."""
