"""What a package index says of it."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest
from markdown_it import MarkdownIt
from packaging.metadata import Metadata

from tests.dist.built import ROOT, Built

SOURCE = "https://code.example/conserve"
page: Callable[[str, str | None], str] = runpy.run_path(str(ROOT / "setup.py"))["page"]
README = (ROOT / "README.md").read_text()


def links(text: str) -> Iterator[str]:
    """Where the links and pictures of a Markdown page lead."""
    for block in MarkdownIt("commonmark").enable("table").parse(text):
        for token in block.children or []:
            for name in ("href", "src"):
                if name in token.attrs:
                    yield str(token.attrs[name])


def test_it_is_valid_and_complete(built: Built) -> None:
    told = Metadata.from_email(built.metadata(), validate=True)
    assert told.name == "conserve-llm"
    assert told.license_expression == "Apache-2.0"
    assert told.summary
    assert {"cpu", "gpu", "ray", "postgres", "s3"} <= set(told.provides_extra or [])
    assert told.description_content_type == "text/markdown"


def test_the_page_renders_and_every_link_leads_somewhere(built: Built) -> None:
    described = Metadata.from_email(built.metadata()).description or ""
    assert described.startswith("# ConServe\n")
    assert all(urlsplit(link).scheme for link in links(described))
    assert "<!--" not in described


def test_links_lead_to_the_repository_where_it_has_an_address() -> None:
    found = list(links(page(README, SOURCE)))
    ours = [urlsplit(link).path for link in found if link.startswith(SOURCE)]
    assert f"{SOURCE}/raw/HEAD/docs/images/demo.png" in found
    assert f"{SOURCE}/blob/HEAD/docs/install.md" in found
    for path in ours:
        assert (ROOT / path.partition("/HEAD/")[2]).is_file(), path


def test_the_readme_as_it_is_would_not_do() -> None:
    assert [link for link in links(README) if not urlsplit(link).scheme]


@pytest.mark.parametrize(
    ("text", "without", "with_address"),
    [
        ("[a](docs/a.md#x)", "a", f"[a]({SOURCE}/blob/HEAD/docs/a.md#x)"),
        ("![b](b.png)", "", f"![b]({SOURCE}/raw/HEAD/b.png)"),
        ("[c](https://c.example)", "[c](https://c.example)", "[c](https://c.example)"),
        ("[d](#here)", "[d](#here)", "[d](#here)"),
    ],
)
def test_what_becomes_of_a_link(text: str, without: str, with_address: str) -> None:
    assert page(text, None) == without
    assert page(text, SOURCE) == with_address
