"""How long a step may take: what offline work may add to it for those who are online."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import takewhile

from conserve.core.latency import LatencyModel, StepShape
from conserve.core.plan import Mode
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import RequestView, RunningByClass, Snapshot
from conserve.core.step import UNLIMITED

STARVED_S = 1.0
"""An offline decode that has waited for a token so long has one, if the targets allow it."""

PROMPT_SHARE = 0.75
"""Of the room beside chat, what decodes leave to a prompt at most. Where it is less, prompts behind
long contexts come slowly, decodes run out meanwhile, and steps then fill up with tokens past the
knee, which cost four times as much."""


def mode_of(snapshot: Snapshot, running: RunningByClass) -> Mode:
    """Who is in the step; `idle` is for whoever finds that it holds nothing."""
    if running.online_prefills or snapshot.waiting_online or snapshot.num_loading_online:
        return Mode.ONLINE_PREFILL
    return Mode.ONLINE_DECODE if running.online_decodes else Mode.OFFLINE


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one step: predicted seconds, the model's margin included."""

    snapshot: Snapshot
    model: LatencyModel
    settings: PolicySettings
    slack_s: float
    """Until the first resident online decode is due its next token."""
    may_stop: bool
    """Whether the step can be stopped, whoever it turns out to hold."""

    def offline_s(self, mode: Mode, online: StepShape) -> float:
        """What offline tokens may fill the step up to, which holds `online` already."""
        snapshot, settings = self.snapshot, self.settings
        if settings.fixed_step_tokens:
            return UNLIMITED
        if mode is Mode.ONLINE_PREFILL and online.num_tokens:
            return min(self.slack_s, self._slowed_s(online, 1 + settings.prefill_stretch))
        if mode is Mode.ONLINE_DECODE:
            return min(self.slack_share_s(), self._slowed_s(online, UNLIMITED))
        if mode is Mode.OFFLINE and self.may_stop:
            return UNLIMITED
        # Also where an online request waits for blocks that only offline work can free, or for
        # its KV to come back.
        return snapshot.targets.ttft_s * settings.unstoppable_share

    def slack_share_s(self) -> float:
        """What the targets leave to a step with online decodes."""
        settings = self.settings
        fill = max(settings.min_slack_fill, self.snapshot.online_residency)
        most = settings.stoppable_slack_fill if self.may_stop else 1.0
        return self.slack_s * min(most, fill)

    def prompt_s(self, limit_s: float, step: StepShape, prompt: RequestView | None) -> float:
        """Of the time up to the limit, what decodes leave to the prompt that is next: a step has
        tokens up to the knee that cost prompts no more than attention, and are lost with it. At
        most PROMPT_SHARE of it: decodes finish requests, and give memory back."""
        room_s = limit_s - self._with_margin_s(step)
        num_free = int(self.model.knee) - step.num_tokens
        if limit_s == UNLIMITED or room_s <= 0 or num_free <= 0 or prompt is None:
            return 0.0
        context = prompt.num_computed_tokens
        longer = replace(step)
        longer.add_prefill(min(num_free, prompt.num_tokens - context), context)
        return min(self._with_margin_s(longer) - self._with_margin_s(step), room_s * PROMPT_SHARE)

    def _slowed_s(self, online: StepShape, most: float) -> float:
        """No limit where nobody online is in the step: the last tokens of all are under way."""
        times = min(most, self.settings.chat_slowdown or UNLIMITED)
        if times == UNLIMITED or not online.num_tokens:
            return UNLIMITED
        return self._with_margin_s(online) * times

    def _with_margin_s(self, shape: StepShape) -> float:
        return self.model.predict_s(shape) * (1 + self.model.margin)


def tbt_slack_s(decodes: list[RequestView], snapshot: Snapshot) -> float:
    """Seconds until the first of these online decodes is due its next token."""
    if not decodes:
        return UNLIMITED
    return min(map(snapshot.targets.next_due_s, decodes)) - snapshot.now_s


def starved(decodes: list[RequestView], now_s: float) -> list[RequestView]:
    """Leading ones that have waited so long that one of them gets a token whatever `chat_slowdown`
    says: one token behind a context so long may be too much of every step."""
    since_s = now_s - STARVED_S
    return list(
        takewhile(lambda r: r.last_token_s is not None and r.last_token_s <= since_s, decodes)
    )
