"""Adapters and the encoder's cache: online requests never wait for what offline ones use of them,
offline ones share them without taking turns at every step, and nobody waits for ever."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from conserve.core import invariants
from conserve.core.invariants import InvariantError
from conserve.core.latency import LatencyModel
from conserve.core.plan import Plan
from conserve.core.policy import Policy, decide
from conserve.core.resources import PASS_S, Resources
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import Capacity, Media, RequestView, Snapshot, Targets
from tests.core.careless import planner_of

NOW_S = 1000.0
MODEL = LatencyModel(fixed=0.01, per_token=1e-4, margin=0.1)
BASE = Snapshot(
    now_s=NOW_S,
    running=(),
    waiting_online=(),
    waiting_offline=(),
    num_free_blocks=1000,
    num_free_slots=8,
    block_size=16,
    max_step_tokens=512,
    targets=Targets(ttft_s=1.0, tbt_s=0.2),
    capacity=Capacity(max_adapters=1),
)
IMAGE = Media(first=10, end=60, num_embeds=50, num_to_compute=50)
ENCODER = Capacity(max_step_embeds=100, num_free_embeds=100)


def decoding(name: str, adapter: int, *, online: bool = False) -> RequestView:
    return RequestView(
        name,
        online,
        NOW_S - 50.0,
        num_tokens=101,
        num_computed_tokens=100,
        num_blocks=7,
        last_token_s=NOW_S - 0.01,
        adapter=adapter,
    )


def waiting(
    name: str,
    adapter: int = 0,
    *,
    online: bool = False,
    ago_s: float = 1.0,
    media: tuple[Media, ...] = (),
) -> RequestView:
    view = RequestView(name, online, NOW_S - ago_s, num_tokens=80, adapter=adapter)
    view.media = media
    return view


def prefilling(
    name: str, *, online: bool = False, computed: int = 20, kept: int = 0, media: Any = ()
) -> RequestView:
    """With `kept` embeddings in the encoder's cache: it is in the middle of an image."""
    return RequestView(
        name,
        online,
        NOW_S - 5.0,
        num_tokens=80,
        num_computed_tokens=computed,
        num_blocks=2,
        media=media,
        num_kept_embeds=kept,
    )


def plan_of(snapshot: Snapshot) -> Plan:
    plan = decide(snapshot, MODEL)
    invariants.check(snapshot, plan, MODEL)
    return plan


def running_and_arriving(adapter: int) -> Snapshot:
    return replace(
        BASE,
        running=[decoding("a0", 1), decoding("a1", 1)],
        waiting_online=[waiting("chat", adapter, online=True)],
    )


def test_offline_work_of_another_adapter_is_held_back_and_keeps_its_place() -> None:
    plan = plan_of(running_and_arriving(2))
    assert plan.grants == {"chat": 80}
    assert not plan.displace, "an adapter is needed where it computes, not where it waits"


@pytest.mark.parametrize("adapter", [0, 1])
def test_offline_work_rides_beside_its_own_adapter_and_beside_none(adapter: int) -> None:
    assert plan_of(running_and_arriving(adapter)).grants.keys() == {"chat", "a0", "a1"}


def test_a_step_takes_as_many_adapters_as_the_machine() -> None:
    snapshot = replace(running_and_arriving(2), capacity=Capacity(max_adapters=2))
    assert plan_of(snapshot).grants.keys() == {"chat", "a0", "a1"}
    snapshot = replace(snapshot, capacity=Capacity())
    assert plan_of(snapshot).grants.keys() == {"chat", "a0", "a1"}, "no adapters are counted"


def test_who_has_run_longest_keeps_the_adapter() -> None:
    """Not whoever waited longest for a token: adapters would change at every step."""
    late, early = decoding("late", 1), decoding("early", 2)
    late.last_token_s = NOW_S - 5.0
    for running, granted in (([early, late], {"early"}), ([late, early], {"late"})):
        assert plan_of(replace(BASE, running=running)).grants.keys() == granted
        beside = replace(BASE, running=[decoding("chat", 0, online=True), *running])
        assert plan_of(beside).grants.keys() == {"chat", *granted}


def test_who_has_nothing_to_compute_needs_no_adapter() -> None:
    in_flight = replace(decoding("in flight", 1), num_tokens=100)
    assert plan_of(replace(BASE, running=[in_flight, decoding("b", 2)])).grants.keys() == {"b"}


def test_room_is_made_for_who_shares_the_adapter_of_those_who_decode() -> None:
    """The prompt that runs waits for its adapter; the arrival does not, and takes the only slot."""
    prompt = replace(prefilling("prompt", online=True), adapter=1)
    chat, victim = decoding("chat", 2, online=True), decoding("victim", 0)
    snapshot = replace(
        BASE,
        running=[prompt, chat, victim],
        waiting_online=[waiting("arrival", 2, online=True)],
        num_free_slots=0,
    )
    plan = plan_of(snapshot)
    assert plan.displace == ["victim"]
    assert plan.grants.keys() == {"chat", "arrival"}


def test_who_waits_for_an_adapter_is_passed_for_a_while_and_no_longer() -> None:
    ages = {"a0": 60.0, "b0": 50.0, "a1": 49.0, "plain": 30.0, "a2": 50.0 - PASS_S}
    adapters = {"a0": 1, "a1": 1, "a2": 1, "b0": 2, "plain": 0}
    views = [waiting(name, adapters[name], ago_s=age) for name, age in ages.items()]
    assert plan_of(replace(BASE, waiting_offline=views)).grants.keys() == {"a0", "a1", "plain"}
    for view in views:
        view.online = True
    assert plan_of(replace(BASE, waiting_online=views)).grants.keys() == {"a0", "a1", "plain"}


def test_two_backlogs_without_end_both_get_on() -> None:
    """P0: one slot, four tokens a request, and a new one of each adapter at every second step."""
    running: list[RequestView] = []
    queue: list[RequestView] = []
    served = dict.fromkeys((1, 2), 0)
    for turn in range(200):
        if turn % 2:
            queue += [waiting(f"{i}.{turn}", i, ago_s=-float(turn)) for i in served]
        snapshot = replace(
            BASE, running=running, waiting_offline=queue, num_free_slots=2 - len(running)
        )
        plan = plan_of(snapshot)
        assert plan.grants or turn == 0
        for view in [view for view in queue if view.request_id in plan.grants]:
            queue.remove(view)
            running.append(replace(decoding(view.request_id, view.adapter), num_stops=0))
            served[view.adapter] += 1
        running = [view for view in running if (left := view.num_tokens) < 104 and left]
        for view in running:
            view.num_tokens += 1
            view.num_computed_tokens += 1
    assert min(served.values()) > 0.8 * max(served.values())


def test_room_for_an_image_is_made_by_those_who_keep_it() -> None:
    snapshot = replace(
        BASE,
        running=[prefilling("image", kept=50), prefilling("text", computed=1)],
        waiting_online=[waiting("chat", online=True, media=(IMAGE,))],
        capacity=replace(ENCODER, num_free_embeds=20),
    )
    plan = plan_of(snapshot)
    assert plan.displace == ["image"]
    assert plan.grants["chat"] == 80
    roomy = replace(snapshot, capacity=ENCODER)
    assert plan_of(roomy).displace == []


def test_a_running_prompt_has_its_next_image_as_soon() -> None:
    snapshot = replace(
        BASE,
        running=[
            prefilling("chat", online=True, computed=5, media=(IMAGE,)),
            prefilling("image", kept=50),
        ],
        capacity=replace(ENCODER, num_free_embeds=20),
    )
    assert plan_of(snapshot).grants["chat"] == 75
    assert plan_of(snapshot).displace == ["image"]


def test_nobody_yields_where_it_would_not_help() -> None:
    snapshot = replace(
        BASE,
        running=[prefilling("image", kept=10)],
        waiting_online=[waiting("chat", online=True, media=(IMAGE,))],
        capacity=replace(ENCODER, num_free_embeds=20),
    )
    plan = plan_of(snapshot)
    assert not plan.displace
    assert plan.grants["chat"] == 10, "up to the image"


def test_what_one_step_can_encode_goes_to_online_requests_first() -> None:
    image = replace(IMAGE, num_embeds=80, num_to_compute=80)
    snapshot = replace(
        BASE,
        running=[prefilling("offline", computed=0, media=(image,))],
        waiting_online=[waiting("chat", online=True, media=(image,))],
        capacity=replace(ENCODER, num_free_embeds=1000),
    )
    assert plan_of(snapshot).grants["chat"] == 80
    assert plan_of(snapshot).grants.get("offline", 0) <= image.first


def test_an_offline_prompt_is_cut_before_the_image_that_has_no_room() -> None:
    first, second = IMAGE, replace(IMAGE, first=60, end=80, num_embeds=60, num_to_compute=60)
    snapshot = replace(BASE, waiting_offline=[waiting("two", media=(first, second))])
    assert plan_of(replace(snapshot, capacity=ENCODER)).grants == {"two": 60}
    cached = replace(second, num_to_compute=0)
    snapshot = replace(snapshot, waiting_offline=[waiting("two", media=(first, cached))])
    assert plan_of(replace(snapshot, capacity=ENCODER)).grants == {"two": 60}, "room it takes"
    roomy = replace(ENCODER, num_free_embeds=110)
    assert plan_of(replace(snapshot, capacity=roomy)).grants == {"two": 80}


def test_an_image_that_waits_for_room_is_not_passed_by_others() -> None:
    """P0: else small ones would keep a large one out for ever."""
    large = replace(IMAGE, num_embeds=80, num_to_compute=80)
    small = replace(IMAGE, num_embeds=5, num_to_compute=5)
    views = [waiting("large", media=(large,)), waiting("small", media=(small,)), waiting("text")]
    running = [prefilling("holds", kept=30), prefilling("small too", computed=0, media=(small,))]
    running = [running[0], prefilling("first", computed=0, media=(large,)), running[1]]
    plan = plan_of(
        replace(
            BASE,
            running=running,
            waiting_offline=views,
            capacity=replace(ENCODER, num_free_embeds=70),
        )
    )
    assert plan.grants == {"holds": 60, "first": 10, "small too": 10, "large": 10, "small": 10} | {
        "text": 80
    }


class IgnoresWhatThereIs(Policy):
    def __init__(self, snapshot: Snapshot, *args: Any) -> None:
        endless = Capacity(max_step_embeds=10**6, num_free_embeds=10**6)
        super().__init__(replace(snapshot, capacity=endless), *args)


class OfflineAdaptersFirst(Policy):
    def _grant_online(self, slack_s: float) -> None:
        self.step.resources.claim(self.running.offline)
        super()._grant_online(slack_s)


class KeepsImagesOfOfflineWork(Policy):
    def _lacking_embeds(self, arrivals: Any) -> int:
        return 0


class DisplacesAllWhoKeepImages(Policy):
    def _lacking_embeds(self, arrivals: Any) -> int:
        return sum(view.num_kept_embeds for view in self.running.offline)


SCENES = (
    running_and_arriving(2),
    replace(
        BASE,
        running=[prefilling("one", kept=40), prefilling("two", kept=40)],
        waiting_online=[waiting("chat", online=True, media=(IMAGE,))],
        capacity=replace(ENCODER, num_free_embeds=20),
    ),
    replace(
        BASE,
        running=[prefilling("one", kept=40)],
        waiting_online=[waiting("chat", online=True, media=(replace(IMAGE, first=0),))],
        capacity=replace(ENCODER, num_free_embeds=20),
    ),
    replace(
        BASE, waiting_offline=[waiting(f"i{i}", media=(IMAGE,)) for i in range(3)], capacity=ENCODER
    ),
    replace(
        BASE,
        waiting_offline=[waiting(f"i{i}", media=(IMAGE,)) for i in range(3)],
        capacity=replace(ENCODER, max_step_embeds=10**4),
    ),
)


@pytest.mark.parametrize("scene", SCENES)
def test_the_policy_itself_passes_every_scene(scene: Snapshot) -> None:
    plan_of(scene)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (IgnoresWhatThereIs, "2 adapters in a step"),
        (IgnoresWhatThereIs, "150 embeddings in a step"),
        (IgnoresWhatThereIs, "150 embeddings into room for 100"),
        (OfflineAdaptersFirst, "chat waits behind offline work"),
        (KeepsImagesOfOfflineWork, "chat waits behind offline work"),
        (DisplacesAllWhoKeepImages, "displaced needlessly"),
    ],
)
def test_a_careless_variant_is_caught(policy: type[Policy], message: str) -> None:
    caught = []
    plan: Callable[..., Plan] = planner_of(policy)
    for scene in SCENES:
        try:
            invariants.check(scene, plan(scene, MODEL, PolicySettings()), MODEL)
        except InvariantError as error:
            caught.append(str(error))
    assert any(re.search(message, one) for one in caught), caught


def test_room_kept_for_its_second_image_keeps_nobody_from_its_first() -> None:
    """P0: where no step is as short as the limit, one request computes its least all the same."""
    second = replace(IMAGE, first=60, end=80, num_embeds=60, num_to_compute=60)
    running = [prefilling("alone", computed=0, media=(IMAGE, second))]
    impatient = replace(BASE, running=running, targets=Targets(ttft_s=1e-3, tbt_s=1e-3))
    plan = plan_of(replace(impatient, capacity=ENCODER))
    assert plan.grants == {"alone": PolicySettings().min_chunk}


def test_an_adapter_is_not_kept_for_whom_an_image_stops() -> None:
    """Else nobody computes: the room for the image comes from those who wait for the adapter."""
    image = (Media(0, 1, 60, 60),)
    capacity = Capacity(max_adapters=1, max_step_embeds=64, num_free_embeds=59)
    for online, num_tokens in ((False, PolicySettings().min_chunk), (True, 80)):
        running = (
            waiting("first", 1, online=online, media=image),
            waiting("behind", 2, online=online),
        )
        stuck = replace(BASE, running=running, capacity=capacity)
        assert plan_of(stuck).grants == {"behind": num_tokens}


def test_resources_are_of_one_step() -> None:
    """Looking down the line changes nothing."""
    resources = Resources(BASE)
    views = [waiting("a", 1), waiting("b", 2)]
    assert resources.line(views) == views[:1]
    assert resources.line(views[1:]) == views[1:]
