"""What routers make of a replica's metrics while offline work without end is queued in it.

Two real schedulers whose real statistics go through vLLM's own logger into one page of metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from vllm.v1.metrics.stats import SchedulerStats

from conserve.engine.online_load import count_online_only
from conserve.engine.queue import ClassQueue
from conserve.engine.settings import EngineSettings
from tests.engine import routers
from tests.engine.device import Device
from tests.engine.engine import BLOCK_SIZE, Engine, make_request, make_scheduler

pytestmark = pytest.mark.engine

HARVESTER, CHATTER = "0", "1"
"""The replica with offline work without end and one chat; the one with chats alone."""
NUM_QUEUED = 60
NUM_BLOCKS = 128


@pytest.fixture(scope="module", params=["online", "all"])
def reading(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def replicas(
    reading: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, routers.Load]]:
    """What a scrape finds of each replica, by name, in the middle of all that."""
    folder = tmp_path_factory.mktemp(reading)
    settings = EngineSettings(profile_seconds=0, router_metrics=reading)
    with engine(folder, settings) as harvester, engine(folder, settings) as chatter:
        page = Page(harvester.scheduler.vllm_config)
        page.watch(harvester, HARVESTER)
        page.watch(chatter, CHATTER)
        chats(harvester, 1)
        chats(chatter, 3)
        for turn in range(100):
            refill(harvester, turn)
            for one in (harvester, chatter):
                one.step()
        text = page.text()
        yield {name: routers.scrape(text, name) for name in (HARVESTER, CHATTER)}


@contextmanager
def engine(folder: Path, settings: EngineSettings) -> Iterator[Engine]:
    scheduler = make_scheduler(folder, num_blocks=NUM_BLOCKS, settings=settings)
    yield Engine(scheduler, Device(BLOCK_SIZE), step_s=0.1)
    scheduler.shutdown()


def chats(engine: Engine, number: int) -> None:
    for index in range(number):
        prompt = list(range(100 * index, 100 * index + 8))
        engine.add(make_request(f"chat-{index}", prompt, 120, online=True, arrival_s=0.0))


def refill(engine: Engine, turn: int) -> None:
    """Keep as many offline requests waiting as there are at first."""
    for index in range(NUM_QUEUED - len(engine.scheduler.waiting.offline)):
        name = f"offline-{turn}-{index}"
        prompt = [500 + (7 * turn + 13 * index + token) % 400 for token in range(30)]
        engine.add(make_request(name, prompt, 60, online=False, arrival_s=0.0))


class Page:
    """/metrics as vLLM's logger writes it, in a registry of its own."""

    def __init__(self, config: Any) -> None:
        self._registry = CollectorRegistry()
        self._logger = self._logger_class()(config, [int(HARVESTER), int(CHATTER)])

    def _logger_class(self) -> Any:
        from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorProm
        from vllm.v1.metrics import loggers

        kinds = {
            "_gauge_cls": partial(Gauge, registry=self._registry),
            "_counter_cls": partial(Counter, registry=self._registry),
            "_histogram_cls": partial(Histogram, registry=self._registry),
        }
        parts = {
            name: type(name, (getattr(loggers.PrometheusStatLogger, name),), kinds)
            for name in ("_spec_decoding_cls", "_perf_metrics_cls")
        }
        parts["_kv_connector_cls"] = type("_kv_connector_cls", (KVConnectorProm,), kinds)
        return type("Logger", (loggers.PrometheusStatLogger,), {**kinds, **parts})

    def watch(self, engine: Engine, name: str) -> None:
        """Write down what every step of this engine says, as an API process does."""
        scheduler = engine.scheduler
        update = scheduler.update_from_output

        def updated(*args: Any) -> Any:
            outputs = update(*args)
            for client in outputs.values():
                if client.scheduler_stats is not None:
                    self._logger.record(client.scheduler_stats, None, engine_idx=int(name))
            return outputs

        scheduler.update_from_output = updated

    def text(self) -> str:
        return generate_latest(self._registry).decode()


def test_the_scene_is_what_it_says(replicas: dict[str, routers.Load], reading: str) -> None:
    """Both readings are there, whichever of them is vLLM's."""
    busy, quiet = replicas[HARVESTER], replicas[CHATTER]
    assert busy["conserve:waiting_requests"] >= NUM_QUEUED - 8, "summed over the classes"
    assert busy["conserve:kv_usage_ratio"] > 0.3
    assert quiet[routers.RUNNING] == 3
    if reading == "online":
        assert (busy[routers.RUNNING], busy[routers.WAITING]) == (1, 0)
        assert busy["vllm:num_requests_waiting_by_reason"] == 0
        assert 0 < busy[routers.KV_USAGE] < quiet[routers.KV_USAGE]
    else:
        assert busy[routers.RUNNING] == busy["conserve:running_requests"] > 1
        assert busy[routers.WAITING] == busy["conserve:waiting_requests"]
        # One is looked at with every step, the other twice a second.
        assert busy[routers.KV_USAGE] == pytest.approx(busy["conserve:kv_usage_ratio"], abs=0.3)


def test_an_endpoint_picker_ranks_by_online_load(
    replicas: dict[str, routers.Load], reading: str
) -> None:
    """The chat goes where fewer chats are. Counting all is the negative control."""
    best = HARVESTER if reading == "online" else CHATTER
    assert routers.picked(replicas) == best
    by_running = routers.fewest_of(routers.RUNNING)(replicas)
    assert max(by_running, key=by_running.__getitem__) == best
    by_queue = routers.load_aware_scores(replicas)
    assert (by_queue[HARVESTER] < by_queue[CHATTER]) == (reading == "all")


def test_a_picker_may_read_our_own_series(replicas: dict[str, routers.Load]) -> None:
    """As docs/fleet.md has them for an engine of its own name: whatever vLLM's count."""
    page = (Path(__file__).parents[2] / "docs" / "fleet.md").read_text()
    waiting, usage = (
        "conserve:waiting_requests{class=online}",
        "conserve:kv_usage_ratio{class=online}",
    )
    assert f"queuedRequestsSpec: '{waiting}'" in page
    assert f"kvUsageSpec: '{usage}'" in page
    assert routers.picked(replicas, waiting, usage) == HARVESTER


def test_nobody_takes_a_harvest_for_saturation(
    replicas: dict[str, routers.Load], reading: str
) -> None:
    saturated = routers.saturation(replicas[HARVESTER]) >= 1
    assert saturated == (reading == "all")
    grows = routers.keda_replicas(replicas) > len(replicas)
    assert grows == (reading == "all")


def test_gates_of_offline_work_close_where_no_more_is_taken(
    replicas: dict[str, routers.Load],
) -> None:
    """By the gauges for it, whatever vLLM's count."""
    budget = "conserve:harvest_budget_ratio"
    assert routers.queried_budget(replicas[HARVESTER][budget]) < 0.05
    assert routers.queried_budget(replicas[CHATTER][budget]) > 0.05
    waiting = "conserve:waiting_requests{class=offline}"
    assert routers.scraped_budget(replicas[HARVESTER], waiting, max_count=16) == 0
    assert routers.scraped_budget(replicas[CHATTER], waiting, max_count=16) == 1


def test_those_that_vllm_cannot_take_yet_are_counted_apart() -> None:
    """As vLLM does, and each once."""
    requests = [
        make_request(name, [1, 2, 3], 4, online=online, arrival_s=0.0)
        for name, online in (("a", True), ("b", True), ("c", False), ("d", True), ("e", False))
    ]
    a, b, c, d, e = requests
    waiting, held = ClassQueue(), ClassQueue()
    for queue, some in ((waiting, (a, b, c)), (held, (d, e))):
        for request in some:
            queue.add_request(request)
    scheduler: Any = SimpleNamespace(
        waiting=waiting, kv_holding_waiting=held, running=[], deferred_waiting={b, c, d}
    )
    stats = SchedulerStats()
    count_online_only(stats, scheduler, kv_usage=0.25)
    assert (stats.num_running_reqs, stats.num_waiting_reqs) == (0, 1)
    assert stats.num_skipped_waiting_reqs == 2
    assert stats.kv_cache_usage == 0.25, "those whose KV has been brought back hold it"


def test_an_engine_that_is_done_says_so(tmp_path: Path) -> None:
    """What the last step says stands until the next: nothing is used, and all may come."""
    with engine(tmp_path, EngineSettings(profile_seconds=0)) as one:
        page = Page(one.scheduler.vllm_config)
        page.watch(one, HARVESTER)
        chats(one, 2)
        refill(one, 0)
        one.run()
        for _ in range(2):
            one.step()
        load = routers.scrape(page.text(), HARVESTER)
    names = (routers.RUNNING, routers.WAITING, routers.KV_USAGE, "conserve:kv_usage_ratio")
    assert [load[name] for name in names] == [0, 0, 0, 0]
    assert load["conserve:harvest_budget_ratio"] == 1
