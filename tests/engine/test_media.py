"""Images under vLLM's own scheduler and encoder cache: a step encodes what its tokens touch and no
more, nothing is computed without, and an online image never waits behind offline ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.engine.settings import EngineSettings
from tests.engine.device import Device, expected_output
from tests.engine.engine import BLOCK_SIZE, Engine, make_request, make_scheduler

pytestmark = pytest.mark.engine

CACHE = 48
"""Embeddings that the encoder's cache holds."""
BUDGET = 32
"""Embeddings that it computes in a step."""
STEP_TOKENS = 24


class SeeingDevice(Device):
    """Keeps embeddings as vLLM's workers do, and looks whether each step finds its own."""

    def __init__(self) -> None:
        super().__init__(BLOCK_SIZE)
        self.features: dict[str, Any] = {}
        self.cache: set[str] = set()
        self.num_encoded = 0

    def run(self, output: Any, stop_at: int | None = None) -> Any:
        self.cache -= set(output.free_encoder_mm_hashes)
        encoded = 0
        for name, numbers in output.scheduled_encoder_inputs.items():
            for feature in [self.features[name][i] for i in numbers]:
                assert self._touches(output, name, feature), "encoded before it is needed"
                self.cache.add(feature.identifier)
                encoded += feature.mm_position.length
        assert encoded <= BUDGET
        self.num_encoded += encoded
        for name in output.num_scheduled_tokens:
            for feature in self.features.get(name, ()):
                if self._touches(output, name, feature):
                    assert feature.identifier in self.cache, f"{name} computes without its image"
        return super().run(output, stop_at)

    def _touches(self, output: Any, name: str, feature: Any) -> bool:
        starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        first = starts[name]
        place = feature.mm_position
        end = first + output.num_scheduled_tokens[name]
        return bool(place.offset < end and first < place.offset + place.length)


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[Any]:
    from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

    made = make_scheduler(
        tmp_path,
        num_blocks=256,
        max_step_tokens=STEP_TOKENS,
        settings=EngineSettings(profile_seconds=0, stop_response_s=1e3),
    )
    made.encoder_cache_manager = EncoderCacheManager(cache_size=CACHE)
    made.max_num_encoder_input_tokens = BUDGET
    yield made
    made.shutdown()


def make_engine(scheduler: Any, **how: Any) -> Engine:
    return Engine(scheduler, SeeingDevice(), **how)


def ask(
    engine: Engine, name: str, num_tokens: int, media: list[tuple[str, int, int]], *, online: bool
) -> list[int]:
    """Returns the prompt."""
    prompt = [Random(name).randrange(1, 900) for _ in range(num_tokens)]
    arrival_s = engine.scheduler.clock.now_s
    request = make_request(name, prompt, 5, online=online, arrival_s=arrival_s, media=media)
    engine.device.features[name] = request.mm_features
    engine.add(request)
    return prompt


def images(chance: Random, num_tokens: int) -> list[tuple[str, int, int]]:
    """One to three of them; some are in several prompts, and each is always of one size."""
    found: list[tuple[str, int, int]] = []
    at = chance.randrange(0, 6)
    while at < num_tokens - 2 and len(found) < 3:
        which = chance.randrange(12)
        length = 5 + which * 2
        if at + length >= num_tokens:
            break
        found.append((f"image-{which}", at, length))
        at += length + chance.randrange(0, 9)
    return found


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_stopped_and_displaced_all_see_their_images(
    scheduler: Any, seed: int, depth: int
) -> None:
    chance = Random(seed)
    scheduler.vllm_config.scheduler_config.async_scheduling = depth > 1
    engine = make_engine(scheduler, depth=depth, stop=lambda _: chance.random() < 0.2)
    prompts = {}
    for i in range(24):
        num_tokens = chance.randrange(20, 110)
        online, name = i % 3 == 0, f"{i:02}"
        media = images(chance, num_tokens)
        prompts[name] = ask(engine, name, num_tokens, media, online=online)
        for _ in range(chance.randrange(0, 5)):
            engine.step()
    engine.run()
    for name, prompt in prompts.items():
        assert engine.outputs[name] == expected_output(prompt, 5), name
    assert engine.num_stops
    assert scheduler.encoder_cache_manager.num_freeable_slots == CACHE, "images are kept"
    assert engine.device.num_encoded


def steps_to_first_token(engine: Engine) -> int:
    """Of an online image, behind offline ones who keep most of the cache while they run."""
    for i in range(4):
        ask(engine, f"off{i}", 100, [(f"page-{i}", 2, 30)], online=False)
    manager = engine.scheduler.encoder_cache_manager
    while manager.num_freeable_slots > CACHE - 30:
        engine.step()
    ask(engine, "chat", 24, [("photo", 0, 24)], online=True)
    for count in range(1, 100):
        engine.step()
        if engine.outputs["chat"]:
            return count
    return 100


def test_an_online_image_does_not_wait_behind_offline_ones(scheduler: Any) -> None:
    engine = make_engine(scheduler)
    assert steps_to_first_token(engine) <= 2
    engine.run()
    assert scheduler.encoder_cache_manager.num_freeable_slots == CACHE


def test_who_does_not_look_at_the_cache_lets_it_wait(
    scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control."""
    monkeypatch.setattr("conserve.engine.snapshots.describe_media", lambda *_: None)
    assert steps_to_first_token(make_engine(scheduler)) > 2


def test_vllm_alone_encodes_what_a_grant_does_not_reach(
    scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of `SeeingDevice`: it asks for the grant behind the encoder."""
    monkeypatch.delattr("conserve.engine.scheduler.ConserveScheduler._try_schedule_encoder_inputs")
    engine = make_engine(scheduler)
    ask(engine, "off", 100, [("one", 10, 20), ("two", 60, 10)], online=False)
    scheduler.driver.planner = cut_to(15, scheduler.driver.planner)
    with pytest.raises(AssertionError, match="encoded before it is needed"):
        engine.run()


def cut_to(num_tokens: int, planner: Any) -> Any:
    from dataclasses import replace

    def plan(*seen: Any) -> Any:
        planned = planner(*seen)
        return replace(planned, grants={n: min(t, num_tokens) for n, t in planned.grants.items()})

    return plan
