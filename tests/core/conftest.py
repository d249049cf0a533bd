"""Seeds for the property tests."""

from __future__ import annotations

from hypothesis import settings

# As everywhere, and more examples.
settings.register_profile("core", settings.get_profile("repeatable"), max_examples=300)
settings.load_profile("core")
