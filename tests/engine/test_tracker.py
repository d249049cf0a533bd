"""What is remembered of requests: latencies, shapes of steps, and the tokens' accounts (P7)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.engine.promises import TBT_ARG, TTFT_ARG, Promises
from conserve.engine.settings import EngineSettings
from conserve.engine.stats import EngineStats
from conserve.engine.tracker import RequestTracker
from tests.engine.device import Device
from tests.engine.engine import BLOCK_SIZE, Engine, make_request, make_scheduler

pytestmark = pytest.mark.engine


@dataclass
class Request:
    """What the tracker reads of vLLM's request."""

    request_id: str
    priority: int = 0
    num_tokens: int = 10
    num_computed_tokens: int = 0
    num_output_placeholders: int = 0
    num_prompt_tokens: int = 10
    max_tokens: int = 100
    next_decode_eligible_step: int = 0
    skip_reading_prefix_cache: bool = False
    resumable: bool = False
    lora_request: None = None
    sampling_params: Any = None

    @property
    def num_tokens_with_spec(self) -> int:
        return self.num_tokens


@pytest.fixture
def tracker() -> RequestTracker:
    tracker = RequestTracker(4, Promises(EngineSettings()))
    tracker.add(Request("on"), 100.0)
    tracker.add(Request("off", priority=1), 100.0)
    return tracker


def test_first_token_and_gaps_by_class(tracker: RequestTracker) -> None:
    stats = EngineStats()
    tracker.emitted("on", 1, 100.5, stats)
    tracker.emitted("on", 1, 100.75, stats)
    tracker.emitted("off", 1, 107.0, stats)
    tracker.emitted("on", 3, 101.75, stats)
    tracker.emitted("gone", 1, 102.0, stats)
    assert stats.data == {
        "ttft_seconds": {"online": [0.5], "offline": [7.0]},
        "tbt_seconds": {"online": [0.25, 1.0]},
        "late_tokens": {"": 2.0},
        "output_tokens": {"online": 5.0, "offline": 1.0},
    }


def test_late_is_by_a_requests_own_target(tracker: RequestTracker) -> None:
    own = SimpleNamespace(extra_args={TTFT_ARG: 3.0, TBT_ARG: 0.5})
    tracker.add(Request("patient", sampling_params=own), 100.0)
    tracker.add(Request("patient, offline", 1, sampling_params=own), 100.0)
    for name in ("on", "patient", "patient, offline"):
        stats = EngineStats()
        for now_s in (102.5, 102.9, 103.8):
            tracker.emitted(name, 1, now_s, stats)
        late = [stats.data.get(kind, {}).get("") for kind in ("late_first_tokens", "late_tokens")]
        assert late == {"on": [1.0, 2.0], "patient": [None, 1.0]}.get(name, [None, None])
    offline = tracker.get("patient, offline")
    assert offline is not None
    assert (offline.deadline_s, offline.ttft_target_s, offline.tbt_target_s) == (103.0, None, None)


def test_running_views_are_brought_up_to_date(tracker: RequestTracker) -> None:
    request = Request("off", 1, num_tokens=12, num_computed_tokens=9, num_output_placeholders=1)
    (view,) = tracker.running([request])
    assert (view.online, view.num_tokens, view.num_computed_tokens) == (False, 13, 9)
    assert view.num_blocks == 3, "nine tokens in blocks of four"
    request.num_computed_tokens = 13
    (again,) = tracker.running([request])
    assert again is view
    assert (again.num_computed_tokens, again.num_blocks) == (13, 4)


def test_blocks_of_a_stopped_step_are_still_held(tracker: RequestTracker) -> None:
    """Else the policy would take their holder for one that has nothing to give."""
    request = Request("off", 1, num_tokens=30, num_computed_tokens=2)
    tracker.running([request])
    tracker.stopped({"off": 15}, {"off": 17})
    tracker.stopped({"off": 6}, {"off": 8})
    (view,) = tracker.running([request])
    assert (view.num_computed_tokens, view.num_blocks, view.num_stops) == (2, 5, 2)
    request.num_computed_tokens = 0
    (view,) = tracker.waiting([request], lambda _: (0, 0), most_tokens=100)
    assert view.num_blocks == 0, "it was sent back since"


def test_nothing_is_left_to_compute_behind_the_last_token(tracker: RequestTracker) -> None:
    """Async scheduling: the token is in flight, and the request ends with it."""
    request = Request("off", 1, num_tokens=14, num_computed_tokens=14, max_tokens=5)
    request.num_output_placeholders = 1
    (view,) = tracker.running([request])
    assert view.num_tokens - view.num_computed_tokens == 0


def test_waiting_views_know_what_the_prefix_cache_has(tracker: RequestTracker) -> None:
    asked = []

    def find_cached(request: Any) -> tuple[int, int]:
        asked.append(request.request_id)
        return 8, 1

    requests = [Request("on", num_tokens=10), Request("off", 1, num_tokens=30)]
    views = tracker.waiting(requests, find_cached, most_tokens=2)
    shown = [(v.num_computed_tokens, v.num_blocks, v.num_borrowed_blocks) for v in views]
    assert shown == [(8, 0, 1), (0, 0, 0)]
    assert asked == ["on"], "the second is out of reach of this step"


def test_a_waiting_request_that_holds_restored_blocks_shows_them_out_of_reach_too(
    tracker: RequestTracker,
) -> None:
    tracker.add(Request("held", 1, num_tokens=30, num_computed_tokens=24), 100.0)
    requests = [Request("off", 1, num_tokens=30), Request("held", 1, 30, 24)]
    views = tracker.waiting(
        requests, lambda request: (request.num_computed_tokens, 0), most_tokens=2
    )
    assert [(v.num_computed_tokens, v.num_blocks > 0) for v in views] == [(0, False), (24, True)]


def test_shapes_tell_decodes_from_prefills_and_classes_apart(tracker: RequestTracker) -> None:
    tracker.add(Request("decode", priority=1), 100.0)
    tracker.emitted("decode", 1, 101.0, EngineStats())
    requests = {
        "on": Request("on", num_computed_tokens=6),
        "off": Request("off", 1, num_computed_tokens=30),
        "decode": Request("decode", 1, num_computed_tokens=21),
    }
    whole, offline = tracker.shape_of({"on": 6, "off": 10, "decode": 1}, requests, 1)
    assert (offline.num_tokens, offline.num_decodes, offline.decode_context) == (11, 1, 20)
    assert offline.attention_pairs == 10 * (20 + 5)
    assert (whole.num_tokens, whole.num_decodes, whole.decode_context) == (17, 1, 20)
    assert whole.attention_pairs == 10 * (20 + 5) + 6 * 3


def test_a_displaced_request_that_prefills_again_is_no_decode(tracker: RequestTracker) -> None:
    tracker.emitted("off", 1, 101.0, EngineStats())
    whole, _ = tracker.shape_of({"off": 8}, {"off": Request("off", 1, num_computed_tokens=8)}, 1)
    assert (whole.num_tokens, whole.num_decodes) == (8, 0)


def test_computing_the_same_again_is_recomputed(tracker: RequestTracker) -> None:
    stats = EngineStats()
    tracker.computed({"off": 8}, {"off": 8}, stats)
    tracker.computed({"off": 4}, {"off": 12}, stats)
    assert "recomputed_tokens" not in stats.data
    tracker.computed({"off": 10}, {"off": 10}, stats)  # it was displaced in between
    tracker.computed({"off": 10}, {"off": 20}, stats)
    assert stats.data["computed_tokens"] == {"offline": 32.0}
    assert stats.data["recomputed_tokens"] == {"offline": 12.0}


def test_a_name_that_comes_again_is_a_new_request(tracker: RequestTracker) -> None:
    stats = EngineStats()
    tracker.computed({"off": 8}, {"off": 8}, stats)
    tracker.add(Request("off", priority=1), 100.0)
    tracker.computed({"off": 8}, {"off": 8}, stats)
    assert "recomputed_tokens" not in stats.data


def test_stops_in_a_row_are_counted(tracker: RequestTracker) -> None:
    tracker.stopped({"off": 4, "gone": 4}, {"off": 4, "gone": 4})
    tracker.stopped({"off": 4}, {"off": 4})
    view = tracker.get("off")
    assert view is not None
    assert view.num_stops == 2
    tracker.computed({"off": 4}, {"off": 4}, EngineStats())
    assert view.num_stops == 0


def test_finished_requests_are_forgotten_in_bulk(tracker: RequestTracker) -> None:
    for i in range(100):
        tracker.add(Request(f"r{i}"), 100.0)
        tracker.computed({f"r{i}": 1}, {f"r{i}": 1}, EngineStats())
    tracker.drop_finished({"on": None, "r7": None})
    assert tracker.get("r7") is not None
    assert tracker.get("r8") is None
    assert set(tracker._high_water) == {"r7"}


MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[MakeEngine]:
    made: list[Any] = []

    def make(depth: int) -> Engine:
        scheduler = make_scheduler(
            tmp_path,
            num_blocks=256,
            async_scheduling=depth > 1,
            settings=EngineSettings(profile_seconds=0, stop="off"),
        )
        made.append(scheduler)
        return Engine(scheduler, Device(BLOCK_SIZE), depth=depth)

    yield make
    for scheduler in made:
        scheduler.shutdown()


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
def test_where_nobody_yields_nothing_is_recomputed(make_engine: MakeEngine, depth: int) -> None:
    """Also where the next step is scheduled before the output of this one is in."""
    engine = make_engine(depth)
    totals = EngineStats()
    connector = engine.scheduler.connector
    connector.get_kv_connector_stats = lambda: None
    for i in range(3):
        prompt = [100 * i + j + 1 for j in range(70)]
        engine.add(make_request(f"off{i}", prompt, 6, online=False, arrival_s=float(i)))
    engine.run()
    totals.aggregate(engine.scheduler.stats)
    assert totals.data["computed_tokens"] == {"offline": engine.device.num_tokens_run}
    assert "recomputed_tokens" not in totals.data
