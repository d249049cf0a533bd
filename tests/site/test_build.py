"""The site is built strictly: what is wrong with a page ends the build, and says where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.site.build import SiteError, render
from scripts.site.gather import gather

CONFIG = """
[project]
site_name = "A site"
docs_dir = "out/pages"
site_dir = "out/site"
nav = [{ "First" = "README.md" }, { "Second" = "docs/second.md" }]
[project.theme]
font = false
"""
FIRST = "# First\n\nSee [the second](docs/second.md#a-heading).\n"
SECOND = "# Second\n\n## A heading\n\n![A picture](picture.svg)\n"
PICTURE = '<svg xmlns="http://www.w3.org/2000/svg"/>'


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with two pages in which nothing is wrong."""
    files = {
        "zensical.toml": CONFIG,
        "README.md": FIRST,
        "docs/second.md": SECOND,
        "docs/picture.svg": PICTURE,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def built(root: Path) -> Path:
    gather(root, root / "out" / "pages")
    return render(root)


def test_two_good_pages_are_a_site(small: Path) -> None:
    site = built(small)
    assert "The second" not in (site / "index.html").read_text()
    assert "docs/second/#a-heading" in (site / "index.html").read_text()
    assert (site / "docs" / "picture.svg").read_text() == PICTURE


def no_such_page(root: Path) -> str:
    (root / "README.md").write_text(f"{FIRST}\n[third](docs/third.md)\n")
    return "README.md: docs/third.md is no file"


def no_such_heading(root: Path) -> str:
    (root / "README.md").write_text(FIRST.replace("#a-heading", "#no-heading"))
    return "anchor does not exist"


def no_such_heading_in_html(root: Path) -> str:
    """What Zensical does not read."""
    (root / "README.md").write_text(f'{FIRST}\n<a href="docs/second/#gone">here</a>\n')
    return "index.html: docs/second/#gone has no such anchor"


def no_such_picture(root: Path) -> str:
    (root / "docs" / "picture.svg").unlink()
    return "docs/second.md: picture.svg is no file"


def no_such_picture_in_html(root: Path) -> str:
    (root / "README.md").write_text(f'{FIRST}\n<img src="gone.png" alt="gone">\n')
    return "index.html: gone.png leads nowhere"


def in_no_place(root: Path) -> str:
    (root / "docs" / "orphan.md").write_text("# Orphan\n")
    return "docs/orphan.md is in no place of nav"


def place_without_a_page(root: Path) -> str:
    (root / "zensical.toml").write_text(CONFIG.replace("docs/second.md", "docs/third.md"))
    return "nav in zensical.toml names docs/third.md, which is not"


def page_in_two_places(root: Path) -> str:
    twice = CONFIG.replace('{ "Second"', '{ "Again" = "README.md" }, { "Second"')
    (root / "zensical.toml").write_text(twice)
    return "nav in zensical.toml names README.md twice"


def list_without_an_empty_line(root: Path) -> str:
    (root / "README.md").write_text(f"{FIRST}\nA list:\n- one\n- two\n")
    return "index.html: no list to a browser"


def column_without_a_name(root: Path) -> str:
    (root / "README.md").write_text(f"{FIRST}\n| one | |\n|---|---|\n| a | b |\n")
    return "index.html: 1 columns of tables have no name"


def script_from_elsewhere(root: Path) -> str:
    (root / "README.md").write_text(f'{FIRST}\n<script src="https://cdn.example/x.js"></script>\n')
    return "index.html: fetches https://cdn.example/x.js"


def font_from_elsewhere(root: Path) -> str:
    (root / "zensical.toml").write_text(CONFIG.replace("font = false", ""))
    return "fetches https://fonts."


@pytest.mark.parametrize(
    "spoil",
    [
        no_such_page,
        no_such_heading,
        no_such_heading_in_html,
        no_such_picture,
        no_such_picture_in_html,
        in_no_place,
        place_without_a_page,
        page_in_two_places,
        list_without_an_empty_line,
        column_without_a_name,
        script_from_elsewhere,
        font_from_elsewhere,
    ],
)
def test_what_is_wrong_ends_the_build(small: Path, spoil: Callable[[Path], str]) -> None:
    said = spoil(small)
    with pytest.raises(SiteError) as raised:
        built(small)
    assert said in str(raised.value)
