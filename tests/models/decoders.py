"""Models that write, with attention to all tokens in every layer."""

from __future__ import annotations

from tests.models.family import Family
from tests.stops.tiny_llama import make_model

FAMILIES = {
    "Llama": Family("full attention", make_model, num_blocks=40),
}
