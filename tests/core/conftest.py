"""Seeds for the property tests."""

from __future__ import annotations

from hypothesis import settings

# As everywhere, whether the same examples or others, and more of them.
settings.register_profile("core", settings.default, max_examples=300)
settings.load_profile("core")
