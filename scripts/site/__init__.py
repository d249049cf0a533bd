"""The documentation site: `python -m scripts.site` leaves it in out/site.

`gather` takes the repository's own Markdown as it is, with all that it links to; `reference` adds
pages made from the code; Zensical builds, strictly; `check` reads what was built.
"""
