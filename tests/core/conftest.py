"""Seeds for the property tests, and the path to the modules they share."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

# The same examples in every run, and no deadline: a slow machine fails nothing.
settings.register_profile("core", derandomize=True, deadline=None, database=None, max_examples=300)
settings.load_profile("core")
