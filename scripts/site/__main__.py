"""`python -m scripts.site`: build the site into out/site, or say what is wrong with it."""

import sys
from pathlib import Path

from scripts.site.build import SiteError, build

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    try:
        site = build(ROOT, ROOT)
    except SiteError as error:
        sys.exit(f"docs: {error}")
    print(f"docs: open {site / 'index.html'}")
