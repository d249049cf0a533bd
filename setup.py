"""The one part of the package's metadata that pyproject.toml cannot say: README.md as a page of
its own. Links to files of the repository become addresses below the project URL `Source`; where
pyproject.toml names none, their words stay and pictures go."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
LINK = re.compile(r"(?P<picture>!?)\[(?P<words>[^\]]*)\]\((?P<path>(?![a-z]+:|#)[^)\s]+)\)")
COMMENT = re.compile(r"^<!--.*?-->\n", re.MULTILINE | re.DOTALL)


def page(text: str, source: str | None) -> str:
    """README.md's text, to be read where its neighbours are not."""

    def link(found: re.Match[str]) -> str:
        if source is None:
            return "" if found["picture"] else found["words"]
        kind = "raw" if found["picture"] else "blob"
        return f"{found['picture']}[{found['words']}]({source}/{kind}/HEAD/{found['path']})"

    return LINK.sub(link, COMMENT.sub("", text))


def long_description() -> str:
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (HERE / "README.md").read_text(encoding="utf-8")
    return page(text, project.get("urls", {}).get("Source"))


if __name__ == "__main__":
    setup(long_description=long_description(), long_description_content_type="text/markdown")
