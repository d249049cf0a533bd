"""First tokens taken apart, from the counters of a run's server."""

from __future__ import annotations

import pytest

from conserve.bench.client import _counters
from conserve.bench.report.figures import Spread
from conserve.bench.report.first_tokens import part_figure, part_figures
from conserve.bench.report.tables import first_token_table
from conserve.bench.store import Run, RunKey
from conserve.metrics.first_tokens import IN_WORDS, Part

KEY = RunKey("all", "conserve", 1)
SERIES = "conserve:first_token_part_seconds"


def page(num_tokens: int, parts: dict[str, tuple[int, int, float]]) -> str:
    """A server's /metrics. parts: those of at most 10 ms, all, and their sum in seconds."""
    own = 'engine="0",model_name="m"'
    lines = [
        "# TYPE conserve:ttft_seconds histogram",
        f'conserve:ttft_seconds_bucket{{class="online",{own},le="+Inf"}} {num_tokens}',
        f'conserve:ttft_seconds_count{{class="online",{own}}} {num_tokens}',
        f'conserve:ttft_seconds_sum{{class="online",{own}}} 1.0',
        f'conserve:ttft_seconds_bucket{{class="offline",{own},le="+Inf"}} 100',
        f'conserve:ttft_seconds_count{{class="offline",{own}}} 100',
        f'conserve:ttft_seconds_sum{{class="offline",{own}}} 1.0',
        f"# TYPE {SERIES} histogram",
    ]
    for part in Part:
        short, num, seconds = parts.get(part, (0, 0, 0.0))
        for bound, count in (("0.01", short), ("0.02", num), ("+Inf", num)):
            lines.append(f'{SERIES}_bucket{{{own},le="{bound}",part="{part}"}} {count}')
        lines.append(f'{SERIES}_count{{{own},part="{part}"}} {num}')
        lines.append(f'{SERIES}_sum{{{own},part="{part}"}} {seconds}')
    return "\n".join(lines) + "\n"


def run_of(start: str, end: str) -> Run:
    return Run(KEY, [], _counters(start), _counters(end), 1.0)


BEFORE = page(10, {"idle": (10, 10, 0.0), "prefill": (0, 10, 0.15)})
AFTER = page(60, {"idle": (20, 20, 0.0), "stop": (0, 5, 0.07), "prefill": (0, 60, 0.9)})


def test_what_happened_within_the_window() -> None:
    figures = part_figures(run_of(BEFORE, AFTER))
    there = (Part.IDLE, Part.STOP, Part.PREFILL)
    absent = {part_figure(part, "share") for part in Part if part not in there}
    assert all(figures[name] == 0.0 for name in absent)
    assert {n: v for n, v in figures.items() if n.split(":")[1] in there} == {
        "part:idle:share": pytest.approx(0.2),
        "part:idle:mean_s": 0.0,
        "part:idle:p99_s": None,
        "part:idle:of_all_s": 0.0,
        "part:stop:share": pytest.approx(0.1),
        "part:stop:mean_s": pytest.approx(0.014),
        "part:stop:p99_s": pytest.approx(0.0199),
        "part:stop:of_all_s": pytest.approx(0.0014),
        "part:prefill:share": 1.0,
        "part:prefill:mean_s": pytest.approx(0.015),
        "part:prefill:p99_s": pytest.approx(0.0199),
        "part:prefill:of_all_s": pytest.approx(0.015),
    }


def test_a_line_for_each_part_that_occurred() -> None:
    begin = page(10, {"prefill": (0, 10, 0.15)})
    ends = ({"stop": (0, 5, 0.07), "prefill": (0, 60, 0.9)}, {"prefill": (0, 60, 1.15)})
    told = [part_figures(run_of(begin, page(60, end))) for end in ends]
    names = dict.fromkeys(name for figures in told for name in figures)
    spreads = {name: Spread.of(figures.get(name) for figures in told) for name in names}
    arm = {name: spread for name, spread in spreads.items() if spread is not None}
    shown = first_token_table({"stock": {}, "conserve": arm})
    assert shown is not None
    assert shown.rows == [
        ["conserve", "the stop itself", "5.0 (0.0 to 10.0)", "14.0", "20", "0.7 (0.0 to 1.4)"],
        ["conserve", "its own steps", "100.0", "17.5 (15.0 to 20.0)", "20", "17.5 (15.0 to 20.0)"],
    ]
    assert all(len(row) == len(shown.headings) for row in shown.rows)


def test_a_server_that_tells_nothing_has_none() -> None:
    assert part_figures(run_of(AFTER, AFTER)) == {}, "no first token"
    assert part_figures(Run(KEY, [], {}, {}, 1.0)) == {}
    assert first_token_table({"stock": {}}) is None


def test_every_part_has_words() -> None:
    assert IN_WORDS.keys() == set(Part)
    assert len(set(IN_WORDS.values())) == len(Part)
