"""What the policy promises, one sentence a test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from conserve.core import invariants
from conserve.core.latency import LatencyModel, StepShape
from conserve.core.plan import Mode, Plan
from conserve.core.policy import decide
from conserve.core.settings import CHAT_SLOWDOWN, PolicySettings
from conserve.core.snapshot import RequestView, Snapshot, Targets
from conserve.core.step import UNLIMITED

NOW_S = 100.0
# One millisecond a token and ten a step: times can be read off token counts.
MODEL = LatencyModel(fixed=0.01, per_token=1e-3)


def decoding(name: str, online: bool, *, ago_s: float = 0.0, **fields: Any) -> RequestView:
    """A running request with one token to compute, its last one out `ago_s` ago."""
    values: dict[str, Any] = {
        "num_tokens": 101,
        "num_computed_tokens": 100,
        "num_blocks": 7,
        "last_token_s": NOW_S - ago_s,
        **fields,
    }
    return RequestView(name, online, NOW_S - 10.0, **values)


def prefilling(name: str, online: bool, left: int, **fields: Any) -> RequestView:
    """A running request with 64 tokens computed and `left` of its prompt to go."""
    values: dict[str, Any] = {
        "num_tokens": 64 + left,
        "num_computed_tokens": 64,
        "num_blocks": 4,
        **fields,
    }
    return RequestView(name, online, NOW_S - 1.0, **values)


def waiting(name: str, online: bool, num_tokens: int, **fields: Any) -> RequestView:
    return RequestView(name, online, NOW_S - 0.1, num_tokens, **fields)


def snapshot(
    *running: RequestView,
    online: tuple[RequestView, ...] = (),
    offline: tuple[RequestView, ...] = (),
    **fields: Any,
) -> Snapshot:
    values: dict[str, Any] = {
        "num_free_blocks": 1000,
        "num_free_slots": 16,
        "block_size": 16,
        "max_step_tokens": 2048,
        "targets": Targets(ttft_s=1.0, tbt_s=0.2),
        **fields,
    }
    return Snapshot(NOW_S, running, online, offline, **values)


TARGETS_ALONE = PolicySettings(chat_slowdown=CHAT_SLOWDOWN["greedy"])


def plan_for(
    scene: Snapshot, model: LatencyModel = MODEL, settings: PolicySettings = TARGETS_ALONE
) -> Plan:
    plan = decide(scene, model, settings)
    invariants.check(scene, plan, model, settings)
    return plan


class TestOnlineFirst:
    def test_online_decodes_are_granted_before_all_else(self) -> None:
        running = [decoding(f"off-{i}", False) for i in range(8)]
        running += [decoding(f"on-{i}", True) for i in range(8)]
        plan = plan_for(snapshot(*running, max_step_tokens=8))
        assert plan.grants == {f"on-{i}": 1 for i in range(8)}

    def test_online_prefills_come_before_offline_work(self) -> None:
        scene = snapshot(
            prefilling("off", False, 500), prefilling("on", True, 500), max_step_tokens=256
        )
        assert plan_for(scene).grants == {"on": 256}

    def test_a_lone_prompt_is_computed_whole(self) -> None:
        plan = plan_for(snapshot(online=(waiting("on", True, 1500),)))
        assert plan.grants == {"on": 1500}
        assert plan.mode is Mode.ONLINE_PREFILL

    def test_prompts_are_chunked_to_keep_resident_decodes_on_target(self) -> None:
        # 200 ms less 10 fixed and 1 for the decode leave 189 tokens.
        scene = snapshot(decoding("on", True), online=(waiting("new", True, 1500),))
        plan = plan_for(scene)
        assert plan.grants == {"on": 1, "new": 189}
        assert plan.predicted_s == pytest.approx(0.2)

    def test_time_since_the_last_token_counts_against_the_target(self) -> None:
        scene = snapshot(
            decoding("on", True, ago_s=0.1),
            decoding("fresh", True),
            online=(waiting("new", True, 1500),),
        )
        assert plan_for(scene).grants["new"] == 88

    def test_a_prompt_gets_min_chunk_even_where_the_target_is_past(self) -> None:
        scene = snapshot(decoding("on", True, ago_s=5.0), online=(waiting("new", True, 1500),))
        assert plan_for(scene).grants == {"on": 1, "new": 32}

    def test_min_chunk_is_shared_by_all_prompts_of_a_step(self) -> None:
        scene = snapshot(
            decoding("on", True, ago_s=5.0),
            prefilling("first", True, 20),
            prefilling("second", True, 500),
            online=(waiting("third", True, 500),),
        )
        assert plan_for(scene).grants == {"on": 1, "first": 20, "second": 12}

    def test_waiting_requests_start_in_order_and_none_overtakes(self) -> None:
        scene = snapshot(
            online=(waiting("large", True, 800), waiting("small", True, 16)), num_free_blocks=40
        )
        assert plan_for(scene).grants == {}

    def test_blocks_promised_to_a_half_computed_prompt_are_not_free(self) -> None:
        half = prefilling("half", True, 640, num_blocks=4)
        scene = snapshot(half, online=(waiting("new", True, 160),), num_free_blocks=49)
        assert "new" not in plan_for(scene).grants
        assert "new" in plan_for(replace(scene, num_free_blocks=50)).grants

    def test_a_first_token_outstanding_is_a_prefill_even_of_one_token(self) -> None:
        plan = plan_for(snapshot(prefilling("on", True, 1)))
        assert plan.mode is Mode.ONLINE_PREFILL
        assert plan.shape.num_decodes == 0


class TestOfflineInTheSlack:
    def test_beside_decodes_it_fills_the_slack(self) -> None:
        scene = snapshot(decoding("on", True), prefilling("off", False, 1000), online_residency=1.0)
        plan = plan_for(scene)
        assert plan.mode is Mode.ONLINE_DECODE
        assert plan.grants == {"on": 1, "off": 189}

    @pytest.mark.parametrize(("residency", "tokens"), [(0.0, 59), (0.35, 59), (0.5, 89)])
    def test_the_share_of_the_slack_is_the_residency_and_at_least_the_setting(
        self, residency: float, tokens: int
    ) -> None:
        scene = snapshot(
            decoding("on", True), prefilling("off", False, 1000), online_residency=residency
        )
        assert plan_for(scene).grants["off"] == tokens

    def test_the_models_margin_stays_free(self) -> None:
        scene = snapshot(decoding("on", True), prefilling("off", False, 1000))
        plan = plan_for(scene, replace(MODEL, margin=0.25))
        # 200 ms / 1.25 = 160 ms.
        assert plan.grants["off"] == 149

    def test_no_slack_no_offline_token(self) -> None:
        scene = snapshot(decoding("on", True, ago_s=0.195), prefilling("off", False, 1000))
        assert plan_for(scene).grants == {"on": 1}

    def test_a_step_with_a_first_token_is_stretched_by_a_sliver_only(self) -> None:
        scene = snapshot(prefilling("off", False, 1000), online=(waiting("on", True, 390),))
        plan = plan_for(scene)
        # 400 ms, and 2 % more.
        assert plan.grants == {"on": 390, "off": 8}

    def test_and_never_past_the_slack_of_resident_decodes(self) -> None:
        scene = snapshot(
            decoding("on", True),
            prefilling("off", False, 1000),
            online=(waiting("new", True, 185),),
        )
        assert plan_for(scene).grants == {"on": 1, "new": 185, "off": 3}

    def test_waiting_offline_requests_do_not_start_beside_a_first_token(self) -> None:
        scene = snapshot(online=(waiting("on", True, 390),), offline=(waiting("off", False, 8),))
        assert plan_for(scene).grants == {"on": 390}

    def test_decodes_before_prefills(self) -> None:
        scene = snapshot(
            decoding("on", True, ago_s=0.17),
            prefilling("chunk", False, 100),
            decoding("token", False),
        )
        assert plan_for(scene).grants == {"on": 1, "token": 1, "chunk": 18}

    def test_of_decodes_that_do_not_all_fit_the_longest_waiting_go_first(self) -> None:
        running = [decoding(f"off-{i}", False, ago_s=float(i)) for i in range(5)]
        scene = snapshot(decoding("on", True, ago_s=0.187), *running)
        assert plan_for(scene).grants == {"on": 1, "off-4": 1, "off-3": 1}

    def test_waiting_offline_requests_start_in_order_while_room_lasts(self) -> None:
        queue = (waiting("a", False, 50), waiting("b", False, 300), waiting("c", False, 50))
        scene = snapshot(decoding("on", True), offline=queue)
        assert plan_for(scene).grants == {"on": 1, "a": 50, "b": 139}

    def test_a_start_leaves_a_block_for_every_running_offline_request(self) -> None:
        scene = snapshot(
            *[decoding(f"off-{i}", False) for i in range(3)],
            offline=(waiting("new", False, 64),),
            num_free_blocks=6,
        )
        assert "new" not in plan_for(scene).grants
        assert "new" in plan_for(replace(scene, num_free_blocks=7)).grants

    def test_no_start_without_a_slot(self) -> None:
        scene = snapshot(offline=(waiting("off", False, 64),), num_free_slots=0)
        plan = plan_for(scene)
        assert plan.grants == {}
        assert plan.mode is Mode.IDLE


class TestBesideWhatChatHasAlone:
    settings = PolicySettings(chat_slowdown=3.05)

    def grants(self, scene: Snapshot, model: LatencyModel = MODEL) -> dict[str, int]:
        return dict(plan_for(scene, model, self.settings).grants)

    def test_a_step_is_no_longer_than_so_many_times_its_online_part(self) -> None:
        # 11 ms alone, so 33.5, of which 22 are left.
        scene = snapshot(decoding("on", True), prefilling("off", False, 1000))
        assert self.grants(scene) == {"on": 1, "off": 22}

    def test_the_margin_cancels_out(self) -> None:
        scene = snapshot(decoding("on", True), prefilling("off", False, 1000))
        assert self.grants(scene, replace(MODEL, margin=0.25)) == {"on": 1, "off": 22}

    def test_the_targets_hold_all_the_same(self) -> None:
        scene = snapshot(decoding("on", True, ago_s=0.1795), prefilling("off", False, 1000))
        assert self.grants(scene) == {"on": 1, "off": 9}

    def test_at_one_offline_work_waits(self) -> None:
        scene = snapshot(decoding("on", True), prefilling("off", False, 1000))
        assert plan_for(scene, settings=PolicySettings(chat_slowdown=1.0)).grants == {"on": 1}

    def test_nor_does_anybody_wait_for_those_whose_last_tokens_are_under_way(self) -> None:
        ending = decoding("on", True, num_tokens=100)
        scene = snapshot(ending, decoding("a", False), decoding("b", False))
        assert self.grants(scene) == {"a": 1, "b": 1}

    def test_a_first_token_is_stretched_no_further(self) -> None:
        scene = snapshot(prefilling("off", False, 1000), online=(waiting("on", True, 390),))
        settings = PolicySettings(chat_slowdown=1.02, prefill_stretch=0.05)
        assert plan_for(scene, settings=settings).grants == {"on": 390, "off": 8}

    def test_a_long_context_keeps_no_shorter_one_waiting(self) -> None:
        model = replace(MODEL, per_context=1e-5)
        long = decoding("long", False, ago_s=0.5, num_tokens=10_001, num_computed_tokens=10_000)
        scene = snapshot(decoding("on", True), long, decoding("short", False))
        assert self.grants(scene, model) == {"on": 1, "short": 1}

    def test_but_gets_a_token_when_it_has_waited_for_long(self) -> None:
        model = replace(MODEL, per_context=1e-5)
        long = decoding("long", False, ago_s=1.0, num_tokens=10_001, num_computed_tokens=10_000)
        scene = snapshot(decoding("on", True), long, decoding("short", False))
        assert self.grants(scene, model) == {"on": 1, "long": 1}

    def test_but_never_past_a_target(self) -> None:
        model = replace(MODEL, per_context=1e-5)
        long = decoding("long", False, ago_s=1.0, num_tokens=20_001, num_computed_tokens=20_000)
        scene = snapshot(decoding("on", True), long, decoding("short", False))
        assert self.grants(scene, model) == {"on": 1, "short": 1}

    def test_who_never_fits_keeps_nobody_from_a_token(self) -> None:
        model = replace(MODEL, per_context=1e-5)
        running = [decoding("on", True)]
        for name, context in (("never", 20_000), ("second", 11_000), ("third", 10_000)):
            size = {"num_tokens": context + 1, "num_computed_tokens": context}
            running.append(decoding(name, False, ago_s=1.0, **size))
        assert self.grants(snapshot(*running), model) == {"on": 1, "second": 1}


class TestPromptsBelowTheKnee:
    """Weights are read for 64 tokens as for one: a step takes 74 ms, and each decode 5 more."""

    model = replace(MODEL, knee=64.0, per_decode=5e-3, per_pair=1e-6)
    settings = PolicySettings(chat_slowdown=1.25)
    decodes = tuple(decoding(f"off-{i}", False) for i in range(6))

    def test_decodes_leave_time_for_those_that_cost_only_attention(self) -> None:
        # 98.7 ms, 79 of them taken: time for three decodes, or for two and 63 tokens' attention.
        scene = snapshot(decoding("on", True), *self.decodes, prefilling("prompt", False, 500))
        grants = plan_for(scene, self.model, self.settings).grants
        assert grants == {"on": 1, "off-0": 1, "off-1": 1, "prompt": 64}

    def test_a_quarter_of_the_time_is_left_to_decodes(self) -> None:
        # 110.6 ms, 79 of them taken: time for six decodes, of which a dear prompt leaves one.
        dear = replace(self.model, per_pair=1e-4)
        settings = replace(self.settings, chat_slowdown=1.4)
        scene = snapshot(decoding("on", True), *self.decodes, prefilling("prompt", False, 500))
        grants = plan_for(scene, dear, settings).grants
        assert grants == {"on": 1, "off-0": 1, "prompt": 4}

    def test_time_that_no_prompt_takes_goes_to_decodes(self) -> None:
        scene = snapshot(
            decoding("on", True),
            *self.decodes,
            offline=(waiting("prompt", False, 500),),
            num_free_slots=0,
        )
        assert len(plan_for(scene, self.model, self.settings).grants) == 4


class TestOfflineMode:
    queue = tuple(waiting(f"off-{i}", False, 2000) for i in range(4))

    def test_without_interruptions_the_step_is_as_large_as_it_may_be(self) -> None:
        plan = plan_for(snapshot(offline=self.queue, can_stop=True))
        assert plan.mode is Mode.OFFLINE
        assert plan.limit_s == UNLIMITED
        assert plan.stoppable
        assert sum(plan.grants.values()) == 2048

    def test_the_more_interruptions_the_smaller_the_step(self) -> None:
        sizes = [
            sum(plan_for(scene).grants.values())
            for rate in (0.0, 0.5, 5.0, 500.0)
            for scene in [snapshot(offline=self.queue, can_stop=True, interruption_rate=rate)]
        ]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) == 4
        assert sizes[-1] == 32

    def test_every_decode_is_in_the_step_however_small_it_is(self) -> None:
        running = [decoding(f"off-{i}", False) for i in range(100)]
        plan = plan_for(snapshot(*running, can_stop=True, interruption_rate=500.0))
        assert len(plan.grants) == 100

    def test_speculating_decodes_count_all_their_tokens(self) -> None:
        running = [decoding(f"off-{i}", False, num_tokens=104) for i in range(20)]
        scene = snapshot(*running, can_stop=True, interruption_rate=500.0, decode_width=4)
        assert plan_for(scene).grants == {f"off-{i}": 4 for i in range(20)}

    def test_a_step_that_cannot_be_stopped_takes_a_tenth_of_the_ttft_target(self) -> None:
        plan = plan_for(snapshot(offline=self.queue, can_stop=False))
        assert plan.grants == {"off-0": 90}
        assert not plan.stoppable

    def test_so_does_one_that_must_not_be_stopped_again(self) -> None:
        worn = waiting("worn", False, 2000, num_stops=3)
        plan = plan_for(snapshot(offline=(worn,), can_stop=True))
        assert plan.grants == {"worn": 90}
        assert not plan.stoppable

    def test_max_stops_none_means_never_stopped(self) -> None:
        scene = snapshot(offline=self.queue, can_stop=True)
        plan = plan_for(scene, settings=PolicySettings(max_stops=0))
        assert not plan.stoppable
        assert plan.grants == {"off-0": 90}

    def test_interruptions_do_not_shrink_a_step_they_cannot_stop(self) -> None:
        scene = snapshot(offline=self.queue, interruption_rate=500.0)
        assert plan_for(scene).grants == {"off-0": 90}

    def test_where_the_limit_is_shorter_than_any_step_one_request_gets_on(self) -> None:
        slow = LatencyModel(fixed=1.0, per_token=1e-3)
        assert plan_for(snapshot(offline=self.queue), slow).grants == {"off-0": 32}
        scene = snapshot(decoding("a", False), decoding("b", False), prefilling("c", False, 9))
        plan = plan_for(scene, slow)
        assert plan.grants == {"a": 1}
        assert plan.shape.num_decodes == 1

    def test_and_it_is_one_that_has_something_to_compute(self) -> None:
        slow = LatencyModel(fixed=1.0, per_token=1e-3)
        in_flight = decoding("in flight", False, num_computed_tokens=101)
        assert plan_for(snapshot(in_flight, decoding("b", False)), slow).grants == {"b": 1}
        assert plan_for(snapshot(in_flight, prefilling("c", False, 99)), slow).grants == {"c": 32}

    def test_a_start_that_fails_the_limit_keeps_neither_slot_nor_blocks(self) -> None:
        """An engine with room for one request only must not stay idle beside it."""
        slow = LatencyModel(fixed=1.0, per_token=1e-3)
        scene = snapshot(offline=self.queue, num_free_slots=1, num_free_blocks=125)
        assert plan_for(scene, slow).grants == {"off-0": 32}

    def test_an_empty_engine_idles(self) -> None:
        plan = plan_for(snapshot())
        assert plan.mode is Mode.IDLE
        assert plan.grants == {}
        assert plan.predicted_s == 0.0


class TestDisplacement:
    busy = (
        decoding("old", False, num_tokens=161, num_computed_tokens=160, num_blocks=11),
        decoding("saved", False, num_blocks=7, num_checkpointed_tokens=100),
    )

    def test_an_arrival_without_blocks_displaces_at_once(self) -> None:
        scene = snapshot(*self.busy, online=(waiting("on", True, 100),), num_free_blocks=0)
        plan = plan_for(scene)
        assert plan.displace == ["saved"]
        assert plan.grants["on"] == 100
        assert "saved" not in plan.grants

    def test_an_arrival_without_a_slot_displaces_at_once(self) -> None:
        scene = snapshot(*self.busy, online=(waiting("on", True, 100),), num_free_slots=0)
        assert plan_for(scene).displace == ["saved"]

    def test_free_blocks_are_used_first(self) -> None:
        scene = snapshot(*self.busy, online=(waiting("on", True, 100),), num_free_blocks=7)
        assert plan_for(scene).displace == []

    def test_nobody_yields_for_offline_requests(self) -> None:
        scene = snapshot(*self.busy, offline=(waiting("off", False, 100),), num_free_blocks=0)
        assert plan_for(scene).displace == []

    def test_online_requests_never_yield(self) -> None:
        scene = snapshot(
            decoding("on", True), online=(waiting("new", True, 100),), num_free_blocks=0
        )
        plan = plan_for(scene)
        assert plan.displace == []
        assert plan.grants == {"on": 1}

    def test_nobody_yields_where_it_cannot_help(self) -> None:
        scene = snapshot(*self.busy, online=(waiting("on", True, 320),), num_free_blocks=1)
        plan = plan_for(scene)
        assert plan.displace == []
        assert "on" not in plan.grants

    def test_as_many_waiting_requests_are_served_as_victims_can(self) -> None:
        queue = (waiting("a", True, 100), waiting("b", True, 176), waiting("c", True, 16))
        scene = snapshot(*self.busy, online=queue, num_free_blocks=0)
        plan = plan_for(scene)
        assert sorted(plan.displace) == ["old", "saved"]
        assert plan.grants == {"a": 100, "b": 176}

    def test_blocks_that_running_online_requests_need_are_made_free_too(self) -> None:
        half = prefilling("half", True, 96, num_blocks=4)
        scene = snapshot(*self.busy, half, online=(waiting("on", True, 16),), num_free_blocks=0)
        # 6 for the one that is half computed and 1 for the arrival: what `saved` holds.
        assert plan_for(scene).displace == ["saved"]

    def test_as_an_ablation_nobody_yields(self) -> None:
        scene = snapshot(*self.busy, online=(waiting("on", True, 100),), num_free_blocks=0)
        plan = plan_for(scene, settings=PolicySettings(displacement=False))
        assert plan.displace == []
        assert plan.num_offline_tokens > 0


def held(name: str, computed: int, blocks: int) -> RequestView:
    """Displaced, and brought back into its blocks."""
    return RequestView(
        name,
        False,
        0.0,
        num_tokens=computed + 1,
        num_computed_tokens=computed,
        num_blocks=blocks,
        num_checkpointed_tokens=computed,
    )


class TestRestores:
    def test_a_checkpoint_is_brought_back_instead_of_computed(self) -> None:
        back = RequestView("back", False, 0.0, num_tokens=161, num_checkpointed_tokens=160)
        plan = plan_for(snapshot(offline=(back,), restore_tokens_per_s=1e6))
        assert (plan.restore, plan.grants) == ({"back": 160}, {})
        plan = plan_for(snapshot(offline=(back,), restore_tokens_per_s=1.0))
        assert not plan.restore
        assert "back" in plan.grants

    def test_nothing_is_brought_back_while_an_online_request_waits(self) -> None:
        back = RequestView("back", False, 0.0, num_tokens=161, num_checkpointed_tokens=160)
        online = RequestView("on", True, 0.0, num_tokens=10)
        scene = snapshot(online=(online,), offline=(back,), restore_tokens_per_s=1e6)
        assert not plan_for(scene).restore

    def test_what_was_brought_back_yields_before_any_running_request(self) -> None:
        online = RequestView("on", True, 0.0, num_tokens=100)
        running = RequestView(
            "off", False, 0.0, num_tokens=101, num_computed_tokens=100, num_blocks=7
        )
        scene = snapshot(
            running,
            online=(online,),
            offline=(held("back", 160, 10),),
            num_free_blocks=0,
        )
        for settings in (PolicySettings(), PolicySettings(displacement=False)):
            plan = plan_for(scene, settings=settings)
            assert plan.displace == ["back"]
            assert "on" in plan.grants

    def test_of_those_that_fill_memory_together_the_first_gets_on(self) -> None:
        """P0: each lacks one block, and together they hold all."""
        scene = snapshot(offline=(held("a", 160, 10), held("b", 160, 10)), num_free_blocks=0)
        plan = plan_for(scene)
        assert plan.displace == ["b"]
        assert plan.grants == {"a": 1}

    def test_none_yields_to_another_beside_one_whose_last_token_is_under_way(self) -> None:
        """Not for blocks, nor for chat's room: both will be had without."""
        ending = decoding("ending", False, num_tokens=100)
        first = waiting("first", False, 80)
        for free, room in ((5, 1), (4, 0)):
            scene = snapshot(
                ending,
                offline=(first, held("back", 48, 3)),
                num_free_blocks=free,
                num_remembered_blocks=room,
            )
            assert plan_for(scene).displace == []
        assert plan_for(replace(scene, running=())).displace == ["back"]


class TestStoppableSteps:
    def test_a_step_of_online_work_alone_is_not_stoppable(self) -> None:
        assert not plan_for(snapshot(decoding("on", True), can_stop=True)).stoppable

    def test_one_that_offline_work_fills_beside_decodes_is(self) -> None:
        """Half of the slack, 10 ms of it fixed, is for it; the rest is for what follows a stop."""
        scene = snapshot(decoding("on", True, ago_s=0.05), offline=self.backlog, can_stop=True)
        plan = plan_for(scene)
        assert plan.stoppable
        assert plan.grants == {"on": 1, "off": 64}
        assert plan.predicted_s == pytest.approx(0.075)
        assert plan.due_s == pytest.approx(NOW_S + 0.15)
        assert plan.online_shape == StepShape(1, 0.0, 1, 100)
        assert plan_for(replace(scene, can_stop=False)).grants == {"on": 1, "off": 139}

    backlog = (waiting("off", False, 1500),)

    def test_not_beside_an_online_prompt(self) -> None:
        arrived = (waiting("new", True, 100),)
        decodes, prompt = decoding("on", True), prefilling("prompt", True, 10)
        for scene in (
            snapshot(decodes, online=arrived, offline=self.backlog, can_stop=True),
            snapshot(prompt, offline=self.backlog, can_stop=True),
        ):
            assert not plan_for(scene).stoppable

    def test_nor_where_somebody_offline_was_stopped_too_often(self) -> None:
        worn = (waiting("off", False, 1500, num_stops=3),)
        plan = plan_for(snapshot(decoding("on", True), offline=worn, can_stop=True))
        assert not plan.stoppable
        assert plan.grants == {"on": 1, "off": 189}

    def test_nor_where_the_token_budget_alone_sizes_the_step(self) -> None:
        scene = snapshot(decoding("on", True), offline=self.backlog, can_stop=True)
        settings = PolicySettings(fixed_step_tokens=512)
        assert not plan_for(scene, settings=settings).stoppable

    @pytest.mark.parametrize(("gap_s", "stoppable"), [(0.0, True), (0.007, True), (0.008, False)])
    def test_nor_a_short_one_that_costs_a_long_gap(self, gap_s: float, stoppable: bool) -> None:
        """A tenth of the 75 ms that it takes."""
        beside = decoding("on", True, ago_s=0.05)
        scene = snapshot(beside, offline=self.backlog, can_stop=True, stop_gap_s=gap_s)
        plan = plan_for(scene)
        assert plan.predicted_s == pytest.approx(0.075)
        assert plan.stoppable is stoppable

    def test_but_one_too_long_for_whoever_arrives_whatever_the_gap(self) -> None:
        scene = snapshot(offline=self.backlog, can_stop=True, stop_gap_s=0.5)
        plan = plan_for(scene)
        assert plan.predicted_s > 0.1, "a tenth of the TTFT target"
        assert plan.stoppable

    def test_nor_one_in_an_engine_that_cannot_stop(self) -> None:
        assert not plan_for(snapshot(decoding("off", False))).stoppable

    def test_nor_an_empty_one(self) -> None:
        assert not plan_for(snapshot(can_stop=True)).stoppable

    @pytest.mark.parametrize(("num_stops", "stoppable"), [(0, True), (2, True), (3, False)])
    def test_nor_one_under_a_request_stopped_too_often(
        self, num_stops: int, stoppable: bool
    ) -> None:
        scene = snapshot(decoding("off", False, num_stops=num_stops), can_stop=True)
        assert plan_for(scene).stoppable is stoppable


class TestFloor:
    def scene(self, share: float, floor: float, **fields: Any) -> Snapshot:
        targets = Targets(tbt_s=0.2, offline_floor=floor)
        return snapshot(
            decoding("on", True, ago_s=0.2),
            prefilling("off", False, 1000),
            targets=targets,
            offline_share=share,
            **fields,
        )

    def test_without_a_floor_no_target_suffers(self) -> None:
        assert plan_for(self.scene(0.0, 0.0)).grants == {"on": 1}

    def test_below_its_floor_offline_work_gets_its_share_of_the_step(self) -> None:
        plan = plan_for(self.scene(share=0.1, floor=0.5))
        # 11 ms for the decode, and as much again.
        assert plan.grants == {"on": 1, "off": 11}
        assert plan.num_floor_tokens == 11

    def test_above_it_nothing_is_added(self) -> None:
        assert plan_for(self.scene(share=0.6, floor=0.5)).grants == {"on": 1}

    def test_what_fitted_the_slack_counts_towards_the_floor(self) -> None:
        targets = Targets(tbt_s=0.2, offline_floor=0.5)
        scene = snapshot(
            decoding("on", True),
            prefilling("a", False, 100),
            prefilling("b", False, 1000),
            targets=targets,
        )
        plan = plan_for(scene)
        assert plan.num_floor_tokens == 0
        assert plan.predicted_s == pytest.approx(0.2)

    def test_it_takes_no_blocks_that_online_requests_wait_for(self) -> None:
        scene = self.scene(
            share=0.0,
            floor=0.5,
            online=(waiting("large", True, 640),),
            offline=(waiting("small", False, 16),),
            num_free_blocks=10,
        )
        plan = plan_for(replace(scene, running=scene.running[:1]))
        assert plan.grants == {"on": 1}


class TestWholePrompts:
    """Where chunked prefill is off: all of a prompt in one step, or nothing of it."""

    def test_one_that_does_not_fit_the_limit_waits(self) -> None:
        scene = snapshot(
            offline=(waiting("fits", False, 60), waiting("not", False, 60)), whole_prompts=True
        )
        # 100 ms for offline steps that cannot be stopped; a second prompt makes it 130.
        assert plan_for(scene).grants == {"fits": 60}

    def test_longer_than_any_limit_it_comes_alone(self) -> None:
        long, short = waiting("long", False, 2000), waiting("short", False, 10)
        plan = plan_for(snapshot(offline=(long, short), whole_prompts=True))
        assert plan.grants == {"long": 2000}

    def test_also_where_shorter_steps_would_harvest_more(self) -> None:
        scene = snapshot(
            offline=(waiting("off", False, 2000),),
            whole_prompts=True,
            can_stop=True,
            interruption_rate=500.0,
        )
        assert plan_for(scene).grants == {"off": 2000}

    def test_and_past_a_fixed_budget(self) -> None:
        scene = snapshot(online=(waiting("on", True, 2000),), whole_prompts=True)
        plan = plan_for(scene, settings=PolicySettings(fixed_step_tokens=300))
        assert plan.grants == {"on": 2000}

    def test_online_prompts_come_in_order_as_far_as_the_engine_goes(self) -> None:
        arrivals = tuple(waiting(f"on-{i}", True, 900) for i in range(3))
        scene = snapshot(online=arrivals, whole_prompts=True)
        assert plan_for(scene).grants == {"on-0": 900, "on-1": 900}

    def test_beside_a_late_decode_one_prompt_gets_on(self) -> None:
        arrivals = (waiting("first", True, 900), waiting("second", True, 900))
        scene = snapshot(decoding("late", True, ago_s=5.0), online=arrivals, whole_prompts=True)
        assert plan_for(scene).grants == {"late": 1, "first": 900}

    def test_below_the_floor_one_passes_the_limit(self) -> None:
        scene = snapshot(
            decoding("on", True, ago_s=5.0),
            offline=(waiting("long", False, 900), waiting("longer", False, 1000)),
            targets=Targets(offline_floor=0.1),
            whole_prompts=True,
        )
        plan = plan_for(scene)
        assert plan.grants == {"on": 1, "long": 900}
        assert plan.num_floor_tokens == 900


class TestAblations:
    def test_a_fixed_budget_replaces_every_target(self) -> None:
        scene = snapshot(decoding("on", True, ago_s=5.0), prefilling("off", False, 1000))
        plan = plan_for(scene, settings=PolicySettings(fixed_step_tokens=300))
        assert plan.grants == {"on": 1, "off": 299}

    def test_and_holds_for_offline_steps_too(self) -> None:
        scene = snapshot(prefilling("off", False, 1000), interruption_rate=500.0, can_stop=True)
        plan = plan_for(scene, settings=PolicySettings(fixed_step_tokens=300))
        assert plan.grants == {"off": 300}


class TestSettings:
    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("chat_slowdown", 0.9, "chat_slowdown must be at least 1, or 0, not 0.9"),
            ("chat_slowdown", float("inf"), "chat_slowdown must be at least 1, or 0, not inf"),
            ("prefill_stretch", -0.1, r"prefill_stretch must be in \[0, 1\], not -0.1"),
            ("min_slack_fill", 1.1, "min_slack_fill"),
            ("stoppable_slack_fill", -0.1, "stoppable_slack_fill"),
            ("patience", 2, "patience"),
            ("unstoppable_share", -1, "unstoppable_share"),
            ("stop_gap_share", 1.5, "stop_gap_share"),
            ("max_stops", -1, "max_stops must be at least 0, not -1"),
            ("min_chunk", 0, "min_chunk must be at least 1, not 0"),
            ("fixed_step_tokens", -5, "fixed_step_tokens"),
        ],
    )
    def test_out_of_bounds_is_refused_by_name(self, name: str, value: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            PolicySettings(**{name: value})

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"ttft_s": 0.0}, "ttft_s must be positive, not 0.0"),
            ({"tbt_s": float("nan")}, "tbt_s must be positive"),
            ({"offline_floor": 1.0}, r"offline_floor must be in \[0, 1\), not 1.0"),
        ],
    )
    def test_targets_too(self, fields: dict[str, float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Targets(**fields)
