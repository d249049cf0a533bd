"""The changelog's section for a release: `python -m scripts.release_notes v0.2.0`.

Refuses a tag that is not the installed version, or has no section.
"""

import re
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TAG = re.compile(r"v\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?")


def section(changelog: str, release: str) -> str | None:
    """What stands below `## RELEASE`, whatever follows it there (a date); None where nothing."""
    for part in re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        if heading.split()[:1] == [release]:
            return text.strip() or None
    return None


def notes(tag: str, built: str, changelog: str) -> str:
    """Raises ValueError with what is wrong with the tag."""
    if not TAG.fullmatch(tag):
        raise ValueError(f"{tag} is no tag of a release; they are like v1.2.3 or v1.2.3rc1")
    if tag != f"v{built}":
        raise ValueError(f"{tag} is not v{built}, which the wheel is")
    found = section(changelog, built)
    if found is None:
        raise ValueError(f"CHANGELOG.md says nothing below '## {built}'")
    return found


def main() -> int:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    try:
        print(notes(sys.argv[1], version("conserve-llm"), changelog))
    except ValueError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
