"""The reference: what can be typed, set, asked and read, as the code has it."""

from pathlib import Path

from scripts.site.reference import api, commands, environment, flags, series, settings

PAGES = {
    "flags.md": flags.page,
    "commands.md": commands.page,
    "settings.md": settings.page,
    "environment.md": environment.page,
    "api.md": api.page,
    "series.md": series.page,
}


def write_reference(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        (folder / name).write_text(page(), encoding="utf-8")
