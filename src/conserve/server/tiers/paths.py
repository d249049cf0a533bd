"""The routes whose requests have classes."""

from __future__ import annotations

PATHS = frozenset(
    {"/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions", "/v1/responses"}
)
VECTOR_PATHS = frozenset(
    {
        "/classify",
        "/pooling",
        "/rerank",
        "/score",
        "/v1/embeddings",
        "/v1/rerank",
        "/v1/score",
        "/v2/embed",
        "/v2/rerank",
    }
)
"""vLLM's for vectors and scores. Their answers name no tier: they have no such field, and are
long."""
ECHOING = "/v1/responses"
"""vLLM puts the tier it was asked for into this endpoint's responses and events."""
