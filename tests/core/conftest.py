"""Seeds for the property tests."""

from __future__ import annotations

from hypothesis import settings

# The same examples in every run, and no deadline: a slow machine fails nothing.
settings.register_profile("core", derandomize=True, deadline=None, database=None, max_examples=300)
settings.load_profile("core")
