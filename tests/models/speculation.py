"""A model that writes, with drafts of which some are right and some are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.models.drafters import make_eagle, make_eagle3, make_mimo, make_repeating
from tests.models.family import Family

NUM_DRAFTS = 3


def by_ngrams(model: str) -> dict[str, Any]:
    """What followed the last token, or the last three, before."""
    return {
        "method": "ngram",
        "num_speculative_tokens": NUM_DRAFTS,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    }


def by_itself(model: str) -> dict[str, Any]:
    """All drafts are right for as long as the draft model's KV is."""
    return {"method": "draft_model", "model": model, "num_speculative_tokens": NUM_DRAFTS}


def by_eagle(model: str) -> dict[str, Any]:
    head = str(make_eagle(Path(model)))
    return {"method": "eagle", "model": head, "num_speculative_tokens": NUM_DRAFTS}


def by_eagle3(model: str) -> dict[str, Any]:
    head = str(make_eagle3(Path(model)))
    return {"method": "eagle3", "model": head, "num_speculative_tokens": NUM_DRAFTS}


def by_mtp(model: str) -> dict[str, Any]:
    """One layer of the model's own, which goes on from its own guesses."""
    return {"method": "mtp", "num_speculative_tokens": NUM_DRAFTS}


def repeating(
    speculation: Callable[[str], dict[str, Any]] | None,
    layers: str = "full attention, of the drafter as well",
    make: Callable[[Path], Path] = make_repeating,
) -> Family:
    """Stops beside drafts under asynchronous scheduling take Model Runner V2, which wants a GPU."""
    options = {"async_scheduling": False}
    return Family(layers, make, num_blocks=40, speculation=speculation, options=options)


PLAIN = "Llama that repeats itself"
"""Without drafts."""
BY_NGRAMS = {"Llama, drafts by n-grams": repeating(by_ngrams, "full attention")}
"""vLLM makes no second engine in a process with n-grams: their compiler is in its way."""
BY_MODEL = {
    PLAIN: repeating(None, "full attention"),
    "Llama, drafts by a draft model": repeating(by_itself),
    "Llama, drafts by EAGLE": repeating(by_eagle),
    "Llama, drafts by EAGLE-3": repeating(by_eagle3),
    "MiMo, drafts by MTP": repeating(by_mtp, make=make_mimo),
}
SPECULATING = [name for name, family in (BY_NGRAMS | BY_MODEL).items() if family.speculation]
