"""The demo's results: one table, and the files it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich.table import Table
from rich.text import Text

from conserve.bench.demo.client import Seen
from conserve.bench.demo.conditions import Conditions
from conserve.bench.demo.figures import Figures, Period, Results, figures
from conserve.metrics.records import write_records


def write_results(
    folder: Path, seen: Seen, periods: tuple[Period, Period], conditions: Conditions
) -> Results:
    """Write summaries, records, figures and picture into `folder`."""
    from conserve.bench.demo.picture import draw  # matplotlib takes a second to import

    alone, together = (figures(seen, period) for period in periods)
    files = folder / "summaries.jsonl", folder / "demo.png"
    results = Results(alone, together, conditions, *files)
    lines = [json.dumps(asdict(summary), ensure_ascii=False) for summary in seen.summaries]
    results.summaries.write_text("".join(f"{line}\n" for line in lines))
    write_records(folder / "requests.jsonl", seen.records)
    told = {**conditions.as_json(), "alone": asdict(alone), "together": asdict(together)}
    (folder / "figures.json").write_text(json.dumps(told, indent=2) + "\n")
    draw(results, seen, periods)
    return results


ROWS: tuple[tuple[str, Callable[[Figures], str]], ...] = (
    ("first token, median", lambda f: _ms(f.ttft_p50_s)),
    ("first token, 99th percentile", lambda f: _ms(f.ttft_p99_s)),
    ("between tokens, median", lambda f: _ms(f.tbt_p50_s)),
    ("between tokens, 99th percentile", lambda f: _ms(f.tbt_p99_s)),
    ("chats", lambda f: f"{f.num_chats} in {f.seconds:.0f} s"),
    ("summaries written", lambda f: str(f.num_summaries)),
    ("chat tokens a second", lambda f: f"{f.chat_tps:,.0f}"),
    ("offline tokens a second", lambda f: f"{f.offline_tps:,.0f}"),
    ("all tokens a second", lambda f: f"{f.total_tps:,.0f}"),
)
DISTURBED_STYLE = "bold red"
SECTIONS_AFTER = (3, 5)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms"


def table(results: Results) -> Table:
    """The figures side by side; tokens are prompt and output tokens together."""
    alone, together = results.alone, results.together
    ratio = together.total_tps / alone.total_tps
    caption = Text(f"{ratio:.1f} times the tokens from the same machine", "bold green")
    caption.append(f"\n{results.conditions.scale_in_words()}", "not bold default")
    if disturbance := results.conditions.disturbance():
        caption.append(f"\n{disturbance}", DISTURBED_STYLE)
    shown = Table(
        title="The same bursts of chat, without and with offline work",
        caption=caption,
        title_style="bold",
    )
    shown.add_column("")
    shown.add_column(alone.name, justify="right")
    shown.add_column(together.name, justify="right", style="bold")
    for index, (name, value) in enumerate(ROWS):
        last = index in SECTIONS_AFTER
        shown.add_row(name, value(alone), value(together), end_section=last)
    return shown
