"""From the repository's Markdown to a site that has been read once."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from conserve.sim.planner.one_file import one_file
from scripts.site.check import faults
from scripts.site.gather import SiteError, gather
from scripts.site.nav import missing_from_nav
from scripts.site.reference import write_reference

CONFIG = "zensical.toml"
PLANNER = "planner.html"
THEME = Path("docs/site/theme")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")

__all__ = ["SiteError", "build", "render"]


def build(root: Path, work: Path) -> Path:
    """The site's folder, `out/site` below `work`, from the repository at `root`.

    Raises SiteError for a link or picture that leads nowhere, a page that is in no place of the
    navigation or missing from it, and anything that a reader would fetch from elsewhere.
    """
    pages = work / "out" / "pages"
    shutil.rmtree(pages, ignore_errors=True)
    gather(root, pages)
    write_reference(pages / "reference")
    (pages / PLANNER).write_text(one_file(home="index.html"), encoding="utf-8")
    if work != root:
        shutil.copyfile(root / CONFIG, work / CONFIG)
        shutil.copytree(root / THEME, work / THEME)
    return render(work)


def render(work: Path) -> Path:
    """The site of the pages that are in `out/pages` already. Raises SiteError."""
    config, pages, site = work / CONFIG, work / "out" / "pages", work / "out" / "site"
    shutil.rmtree(site, ignore_errors=True)
    _stop_at(missing_from_nav(config, pages))
    _run_zensical(config)
    _stop_at(faults(site))
    return site


def _stop_at(found: list[str]) -> None:
    if found:
        raise SiteError("\n      ".join(found))


def _run_zensical(config: Path) -> None:
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    run = subprocess.run(
        [*command, "--config-file", str(config)], capture_output=True, text=True, check=False
    )
    if run.returncode:
        said = COLOURS.sub("", run.stdout + run.stderr).partition("Traceback")[0]
        raise SiteError(said.strip())
