"""What an input file must be: a file, its lines and their requests are held against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Of one file and one line, where the settings say nothing else.
MAX_LINES = 50_000
MAX_LINE_BYTES = 16 * 1024 * 1024
# Believed of one request of a model whose length is not known.
MAX_OUTPUT_TOKENS = 1_000_000
# Assumed of a line that names no maximum.
OUTPUT_TOKENS = 256


@dataclass(frozen=True)
class ModelLimits:
    """What one served model can give; None where the server does not say."""

    max_model_len: int | None = None


@dataclass(frozen=True)
class Rules:
    """What a file must be: where its lines go, which models are there, and how much is allowed.

    `models` is None when the server names none; then any model passes. `mean_output_tokens` is
    what lines like these came to, where that is known: one takes so much, or less if it says so.
    """

    endpoint: str
    models: Mapping[str, ModelLimits] | None = None
    max_lines: int = MAX_LINES
    max_line_bytes: int = MAX_LINE_BYTES
    default_output_tokens: int = OUTPUT_TOKENS
    mean_output_tokens: float | None = None
