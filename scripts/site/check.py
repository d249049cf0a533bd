"""Reads a built site as a browser would: where links lead, and what is fetched from where."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {
    "img": ("src", "srcset"),
    "script": ("src",),
    "iframe": ("src",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "audio": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "input": ("src",),
    "use": ("href", "xlink:href"),
    "image": ("href", "xlink:href"),
}
LOADING_LINKS = ("stylesheet", "icon", "preload", "prefetch", "modulepreload", "preconnect")
IN_STYLE = re.compile(r"""(?:url\(\s*['"]?|@import\s+['"])((?:https?:)?//[^'")\s]+)""")
BULLET = re.compile(r"\n *([-*] [^\n]+)")


@dataclass
class Links(HTMLParser):
    """What one page's HTML names."""

    leads_to: list[str] = field(default_factory=list)
    fetches: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    run_together: list[str] = field(default_factory=list)
    """Lines of a paragraph that were meant to begin a list."""
    in_paragraph: bool = False
    unnamed_columns: int = 0
    head: str | None = None
    """What has been read of the head of a column, while it is one."""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.in_paragraph |= tag == "p"
        self.head = "" if tag == "th" else self.head
        if name := given.get("id") or (given.get("name") if tag == "a" else None):
            self.anchors.add(name)
        self.fetches += [given[name] for name in FETCHED.get(tag, ()) if name in given]
        self.fetches += IN_STYLE.findall(given.get("style", ""))
        if tag == "link" and set(given.get("rel", "").split()) & set(LOADING_LINKS):
            self.fetches.append(given.get("href", ""))
        elif tag == "a" and "href" in given:
            self.leads_to.append(given["href"])

    def handle_endtag(self, tag: str) -> None:
        self.in_paragraph &= tag != "p"
        if tag == "th":
            self.unnamed_columns += not (self.head or "").strip()
            self.head = None

    def handle_data(self, data: str) -> None:
        if self.in_paragraph:
            self.run_together += BULLET.findall(data)
        if self.head is not None:
            self.head += data


def faults(site: Path) -> list[str]:
    """Links, pictures and scripts to nothing, and what would be fetched from another host."""
    found = [fault for page in sorted(site.rglob("*.html")) for fault in _of_page(site, page)]
    for sheet in sorted(site.rglob("*.css")):
        foreign = IN_STYLE.findall(sheet.read_text(encoding="utf-8"))
        found += [f"{sheet.relative_to(site)}: fetches {url}" for url in foreign]
    return found


@cache
def _links(page: Path) -> Links:
    links = Links()
    links.feed(page.read_text(encoding="utf-8"))
    return links


def _of_page(site: Path, page: Path) -> Iterator[str]:
    name, links = page.relative_to(site), _links(page)
    if links.unnamed_columns:
        yield f"{name}: {links.unnamed_columns} columns of tables have no name"
    for line in links.run_together:
        yield f"{name}: no list to a browser without an empty line before it: {line}"
    for url in links.fetches:
        if urlsplit(url).netloc:
            yield f"{name}: fetches {url}"
    for url in [*links.leads_to, *links.fetches]:
        parts = urlsplit(url)
        if parts.scheme or parts.netloc or page.name == "404.html":
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        if target.is_dir():
            target /= "index.html"
        if not target.is_file():
            yield f"{name}: {url} leads nowhere"
        elif not _has_anchor(target, unquote(parts.fragment)):
            yield f"{name}: {url} has no such anchor"


def _has_anchor(target: Path, fragment: str) -> bool:
    return not fragment or target.suffix != ".html" or fragment in _links(target).anchors
