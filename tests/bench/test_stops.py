"""Figures of stops from a run's counters."""

from __future__ import annotations

from conserve.bench.client import _counters
from conserve.bench.report.stops import stop_figures
from conserve.bench.store import Run, RunKey

KEY = RunKey("all", "conserve", 1)

METRICS = """\
# TYPE conserve:stopped_steps counter
conserve:stopped_steps_total{{engine="0",model_name="m"}} {stops}
# TYPE conserve:stopped_layers counter
conserve:stopped_layers_total{{engine="0",model_name="m"}} {layers}
# TYPE conserve:unstopped_arrivals counter
conserve:unstopped_arrivals_total{{engine="0",model_name="m"}} 3
# TYPE conserve:dropped_tokens counter
conserve:dropped_tokens_total{{engine="0",model_name="m"}} {dropped}
# TYPE conserve:computed_tokens counter
conserve:computed_tokens_total{{engine="0",model_name="m",class="online"}} 100
conserve:computed_tokens_total{{engine="0",model_name="m",class="offline"}} {computed}
# TYPE conserve:stop_response_seconds histogram
conserve:stop_response_seconds_bucket{{engine="0",model_name="m",le="0.05"}} {stops}
conserve:stop_response_seconds_bucket{{engine="0",model_name="m",le="0.1"}} {slow}
conserve:stop_response_seconds_bucket{{engine="0",model_name="m",le="+Inf"}} {slow}
conserve:stop_response_seconds_count{{engine="0",model_name="m"}} {slow}
conserve:stop_response_seconds_sum{{engine="0",model_name="m"}} 0.5
# TYPE conserve:ttft_seconds histogram
conserve:ttft_seconds_bucket{{engine="0",model_name="m",class="online",le="+Inf"}} 4
"""


def run_of(start: str, end: str) -> Run:
    return Run(KEY, [], _counters(start), _counters(end), 1.0)


def test_what_happened_within_the_window() -> None:
    start = METRICS.format(stops=2, layers=10, dropped=50, computed=1000, slow=2)
    end = METRICS.format(stops=12, layers=60, dropped=100, computed=1950, slow=12)
    run = run_of(start, end)
    assert stop_figures(run) == {
        "num_stopped_steps": 10,
        "stop_response_p50_s": 0.025,
        "stop_response_p99_s": 0.0495,
        "stop_response_p50_layers": None,
        "stop_response_p99_layers": None,
        "stopped_layers_mean": 5.0,
        "num_unstopped_arrivals": 0.0,
        "dropped_share": 50 / 1000,
    }
    assert not any("ttft_seconds_bucket" in name for name in run.counters_end)


def test_a_server_that_stops_nothing_has_none() -> None:
    still = METRICS.format(stops=2, layers=10, dropped=50, computed=1000, slow=2)
    assert stop_figures(run_of(still, still)) == {}
    assert stop_figures(Run(KEY, [], {}, {}, 1.0)) == {}
