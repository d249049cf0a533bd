"""Policies that differ from ours in one place each; a test must catch every one of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from conserve.core.latency import LatencyModel
from conserve.core.plan import Mode, Plan
from conserve.core.policy import Planner, Policy
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import RequestView, Sharing, Snapshot
from conserve.core.step import UNLIMITED


def planner_of(policy: type[Policy]) -> Planner:
    def plan(snapshot: Snapshot, model: LatencyModel, settings: PolicySettings) -> Plan:
        return policy(snapshot, model, settings).plan()

    return plan


class IgnoresTbt(Policy):
    def _offline_limit_s(self, mode: Mode) -> float:
        return UNLIMITED if mode is Mode.ONLINE_DECODE else super()._offline_limit_s(mode)


class DeafToOwnTargets(Policy):
    def __init__(self, snapshot: Snapshot, *args: Any) -> None:
        running = [replace(view, tbt_target_s=None) for view in snapshot.running]
        super().__init__(replace(snapshot, running=running), *args)


class StretchesFirstTokens(Policy):
    def _offline_limit_s(self, mode: Mode) -> float:
        return (
            self.limits.slack_s if mode is Mode.ONLINE_PREFILL else super()._offline_limit_s(mode)
        )


class ForgetsAlone(Policy):
    def _offline_limit_s(self, mode: Mode) -> float:
        beside = mode is Mode.ONLINE_DECODE
        return self.limits.slack_share_s() if beside else super()._offline_limit_s(mode)


class SkipsAnOnlineDecode(Policy):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        del self.running.online_decodes[1:]


class LongUnstoppable(Policy):
    _may_stop = True


class StopsForEver(Policy):
    def _stoppable(self, mode: Mode, num_online: int) -> bool:
        return not num_online and self.snapshot.can_stop


class StopsFirstTokens(Policy):
    def _stoppable(self, mode: Mode, num_online: int) -> bool:
        return True


class StopsFullSlack(Policy):
    def _offline_limit_s(self, mode: Mode) -> float:
        return self.limits.slack_s if mode is Mode.ONLINE_DECODE else super()._offline_limit_s(mode)


class RestoresAtAnyPrice(Policy):
    def _restores_online(self, request: RequestView) -> bool:
        return self.step.restore(request, request.num_checkpointed_tokens, 0)


class ForgetsDisplaced(Policy):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.forgotten: list[str] = []

    def _displace(self, promised: int) -> None:
        super()._displace(promised)
        self.forgotten = list(self.step.displaced)
        self.step.displaced.clear()

    def plan(self) -> Plan:
        plan = super().plan()
        return replace(plan, displace=(*plan.displace, *self.forgotten))


class DisplacesEverybody(Policy):
    def _displace(self, promised: int) -> None:
        if self.snapshot.waiting_online:
            self.step.release(self.running.offline, slots=True)


class DisplacesForNobody(Policy):
    def _grant_online_prefills(self, slack_s: float) -> None:
        self.step.release(self.running.offline_decodes[:1], slots=True)


class DisplacesOnline(Policy):
    def _displace(self, promised: int) -> None:
        super()._displace(promised)
        if self.snapshot.waiting_online:
            self.step.release(self.running.online_decodes[:1], slots=True)


class YieldsForNobody(Policy):
    def _release_held(self, num_blocks: int) -> None:
        self.step.release(self.held, slots=False)


class ForgetsLeastProgress(Policy):
    def _grant_least(self) -> None:
        pass


class ForgetsOnlineMinimum(Policy):
    def _grant_online(self, slack_s: float) -> None:
        if slack_s > 0:
            super()._grant_online(slack_s)


class GivesPromisedBlocksAway(Policy):
    def plan(self) -> Plan:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("conserve.core.policy.promised_blocks", lambda *_: 0)
            return super().plan()


class CountsSharedAsFreed(Policy):
    def __init__(self, snapshot: Snapshot, *args: Any) -> None:
        super().__init__(replace(snapshot, sharing=Sharing()), *args)


class TakesChatsMemory(Policy):
    def __init__(self, snapshot: Snapshot, *args: Any) -> None:
        super().__init__(replace(snapshot, num_remembered_blocks=0), *args)


class KeepsAllForChat(Policy):
    def _room_beside(self, request: RequestView) -> int:
        return self.snapshot.num_remembered_blocks


class CutsPrompts(Policy):
    def __init__(self, snapshot: Snapshot, *args: Any) -> None:
        super().__init__(replace(snapshot, whole_prompts=False), *args)


class MoreSlots(Policy):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.step.slots_left += 100


class MoreTokens(Policy):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.step.tokens_left += 100


class StarvesOffline(ForgetsLeastProgress):
    def _grant_offline(self, limit_s: float, mode: Mode) -> None:
        pass
