"""What was measured, on disk at once and whole: a run may be cut off at any moment."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

NOT_BUNDLED = ("models", "cache", "partial")


def write_json(path: Path, value: Any) -> None:
    """The file is there whole, or not at all."""
    partial = path.with_name(f"partial-{path.name}")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


def bundle(folder: Path, archive: Path) -> None:
    """Everything in `folder` but models and caches, as one file in place of the last."""
    partial = archive.with_name(f"partial-{archive.name}")
    with tarfile.open(partial, "w:gz", compresslevel=3) as tar:
        for path in sorted(folder.iterdir()):
            if not path.name.startswith(NOT_BUNDLED):
                tar.add(path, path.name)
    os.replace(partial, archive)
