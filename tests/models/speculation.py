"""A model that writes, with drafts."""

from __future__ import annotations

from typing import Any

from tests.models.family import Family
from tests.stops.tiny_llama import make_model


def by_ngrams(model: str) -> dict[str, Any]:
    """What followed the last token, or the last three, before."""
    return {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    }


FAMILIES = {
    "Llama, drafts by n-grams": Family(
        "full attention", make_model, num_blocks=40, speculation=by_ngrams
    ),
}
"""vLLM makes no second engine in a process with n-grams: their compiler is in its way."""
