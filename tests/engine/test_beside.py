"""A user's KV connector beside ours: configuration, statistics, and which steps may be stopped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from prometheus_client import Counter, Gauge, Histogram

from conserve.engine import plugin
from conserve.engine import stopper as stopper_module
from conserve.engine.beside import others_have_work
from conserve.engine.connector import ConserveConnector, StepMetadata, find_ours
from conserve.engine.door import KVConnectorBase_V1, KVConnectorMetadata
from conserve.engine.launch import connectors
from conserve.engine.stats import EngineStats
from tests.engine.device import Device, expected_output
from tests.engine.engine import BLOCK_SIZE, Engine, make_request, make_scheduler

pytestmark = pytest.mark.engine

OURS = connectors(None)


@dataclass
class Notes(KVConnectorMetadata):  # type: ignore[misc]
    """What the pretend store is to keep after a step: request_id -> tokens computed by then."""

    keep: dict[str, int] = field(default_factory=dict)


class NotingConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Asked to keep each prompt when its last token is computed, as a KV store would be."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.lengths: dict[str, int] = {}

    def build_connector_meta(self, scheduler_output: Any) -> Notes:
        notes = Notes()
        for new in scheduler_output.scheduled_new_reqs:
            self.lengths[new.req_id] = len(new.prompt_token_ids)
            self._note(notes, scheduler_output, new.req_id, new.num_computed_tokens)
        cached = scheduler_output.scheduled_cached_reqs
        for name, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            self._note(notes, scheduler_output, name, computed)
        return notes

    def _note(self, notes: Notes, output: Any, name: str, computed: int) -> None:
        end = computed + output.num_scheduled_tokens[name]
        if computed < self.lengths[name] <= end:
            notes.keep[name] = self.lengths[name]

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass


THEIRS = {"kv_connector": "NotingConnector", "kv_role": "kv_both", "engine_id": "mine"}


class TestConfiguration:
    def test_alone(self) -> None:
        assert OURS["kv_connector"] == "ConserveConnector"
        assert connectors({}) == connectors(OURS) == OURS

    def test_ours_looks_first(self) -> None:
        joined = connectors(THEIRS)
        children = joined["kv_connector_extra_config"]["connectors"]
        assert joined["kv_connector"] == "MultiConnector"
        assert [child["kv_connector"] for child in children] == [
            "ConserveConnector",
            "NotingConnector",
        ]

    def test_the_engines_own_settings_are_the_users(self) -> None:
        given = {**THEIRS, "kv_role": "kv_consumer", "kv_load_failure_policy": "recompute"}
        joined = connectors(given)
        assert joined["engine_id"] == "mine"
        assert joined["kv_role"] == "kv_consumer"
        assert joined["kv_load_failure_policy"] == "recompute"
        child = joined["kv_connector_extra_config"]["connectors"][1]
        assert "engine_id" not in child, "vLLM gives every child the id of the whole"

    def test_a_multi_connector_gets_ours_once(self) -> None:
        several: dict[str, Any] = {
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"connectors": [THEIRS], "theirs": 1},
        }
        joined = connectors(several)
        assert joined["kv_connector_extra_config"] == {"connectors": [OURS, THEIRS], "theirs": 1}
        assert connectors(joined) == joined
        assert several["kv_connector_extra_config"]["connectors"] == [THEIRS], "left as it was"


@pytest.fixture
def beside(tmp_path: Path) -> Iterator[Engine]:
    theirs = {"kv_connector": "NotingConnector", "kv_role": "kv_both"}
    theirs["kv_connector_module_path"] = __name__
    scheduler = make_scheduler(tmp_path, max_step_tokens=16, num_blocks=256, their_connector=theirs)
    yield Engine(scheduler, Device(BLOCK_SIZE))
    scheduler.shutdown()


def run_under_stops(engine: Engine) -> tuple[int, list[dict[str, int]]]:
    """Stop every step that may be; how many there were, and what the store was asked in them."""
    asked: list[dict[str, int]] = []
    run = engine.device.run

    def note(output: Any, stop_at: int | None = None) -> Any:
        if stop_at is not None:
            asked.append(output.kv_connector_metadata.metadata[1].keep)
        return run(output, stop_at)

    engine.device.run = note
    engine.stop = lambda step: True
    prompts = {f"off{i}": [40 * i + j + 1 for j in range(37)] for i in range(6)}
    for i, (name, prompt) in enumerate(prompts.items()):
        engine.add(make_request(name, prompt, 6, online=False, arrival_s=float(i)))
    engine.run()
    assert engine.outputs == {name: expected_output(p, 6) for name, p in prompts.items()}
    return engine.num_stops, asked


def test_no_step_that_they_save_in_is_stopped(beside: Engine) -> None:
    num_stops, asked = run_under_stops(beside)
    assert num_stops > 5
    assert not any(asked)


def test_a_scheduler_that_forgets_them_is_caught(
    beside: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the test above."""
    monkeypatch.setattr(stopper_module, "others_have_work", lambda metadata: False)
    _, asked = run_under_stops(beside)
    assert any(asked), "the store believes that it has what a stopped step never computed"


def test_such_a_step_is_not_announced_and_the_next_is_planned_short(beside: Engine) -> None:
    beside.add(make_request("off", list(range(1, 11)), 4, online=False, arrival_s=1.0))
    driver, seen = beside.scheduler.driver, list[bool]()
    decide = driver.planner

    def noting(snapshot: Any, *others: Any) -> Any:
        seen.append(snapshot.can_stop)
        return decide(snapshot, *others)

    driver.planner = noting
    output = beside.scheduler.schedule()
    ours, theirs = output.kv_connector_metadata.metadata
    assert theirs.keep == {"off": 10}
    assert ours.stoppable_step is None
    assert not list(driver.steps)[-1].plan.stoppable
    beside.scheduler.update_from_output(output, beside.device.run(output))
    output = beside.scheduler.schedule()
    assert not output.kv_connector_metadata.metadata[1].keep
    beside.scheduler.update_from_output(output, beside.device.run(output))
    beside.scheduler.schedule()
    assert seen == [True, False, True]


class Unequal:
    """Metadata that cannot be made without arguments."""

    def __init__(self, what: int) -> None:
        self.what = what


@dataclass
class Several:
    metadata: tuple[Any, ...]


@pytest.mark.parametrize(
    ("metadata", "have_work"),
    [
        (StepMetadata(stoppable_step=3), False),
        (Several((StepMetadata(stoppable_step=3), Notes())), False),
        (Several((StepMetadata(), Notes({"a": 1}))), True),
        (Several((StepMetadata(), Unequal(0))), True),
        (Several((StepMetadata(), object())), True),
    ],
)
def test_what_equals_a_fresh_one_asks_nothing(metadata: Any, have_work: bool) -> None:
    assert others_have_work(metadata) is have_work


def test_our_figures_go_through_vllms_multi_connector(tmp_path: Path, beside: Engine) -> None:
    """Scheduler side, the wire's form, the log's form and Prometheus."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import multi_connector

    plugin.register()
    beside.scheduler.stats.count("dropped_tokens", 5.0)
    stats = beside.scheduler.connector.get_kv_connector_stats()
    wire = stats.to_dict()
    assert wire["ConserveConnector"]["dropped_tokens"] == {"": 5.0}
    read = multi_connector.MultiConnector.build_kv_connector_stats(wire)
    assert isinstance(read["ConserveConnector"], EngineStats)
    assert read.reduce()["ConserveConnector"] == {"dropped_tokens": 5}
    registered: list[str] = []
    counted: list[float] = []

    class Series:
        def __init__(self, name: str, **options: Any) -> None:
            registered.append(name)

        def labels(self, *values: Any) -> Series:
            return self

        def inc(self, value: float) -> None:
            counted.append(value)

        def set(self, value: float) -> None:
            """Gauges that the scheduler sets when it is built."""

    prom = multi_connector.MultiConnector.build_prom_metrics(
        beside.scheduler.vllm_config,
        {Counter: Series, Gauge: Series, Histogram: Series},
        ["model_name", "engine"],
        {0: ["m", "0"]},
    )
    prom.observe(wire, 0)
    assert "conserve:dropped_tokens" in registered
    assert counted == [5.0]
    assert isinstance(find_ours(beside.scheduler.connector), ConserveConnector)
