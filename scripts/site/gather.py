"""The pages: the repository's own Markdown, and every file that it links to, at the same paths.

So a link that works on a code host works on the site, and nothing is rewritten.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

FIRST = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/**/*.md",
    "docs/site/*.css",
    "docs/site/*.js",
)
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2[`~]*\s*?$", re.MULTILINE | re.DOTALL)


class SiteError(Exception):
    """What is wrong with the pages, each fault on a line."""


def gather(root: Path, pages: Path) -> None:
    """Copy them below `pages`. Raises SiteError, naming page and link, for one to nothing."""
    to_do = [path for pattern in FIRST for path in sorted(root.glob(pattern)) if path.is_file()]
    seen, faults = set(to_do), []
    while to_do:
        path = to_do.pop()
        copy = pages / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        for target in links(path):
            found = Path(*(path.parent / target).resolve().relative_to(root.resolve()).parts)
            file = root / found
            if found.parts[:1] == ("reference",):
                continue  # made from the code
            if not file.is_file():
                faults.append(f"{path.relative_to(root)}: {target} is no file")
            elif file not in seen:
                seen.add(file)
                to_do.append(file)
    if faults:
        raise SiteError("\n      ".join(sorted(faults)))


def links(path: Path) -> Iterator[str]:
    """What a page of Markdown links to in this repository, pictures too, outside of its code."""
    if path.suffix == ".md":
        yield from LINK.findall(FENCE.sub("", path.read_text(encoding="utf-8")))
