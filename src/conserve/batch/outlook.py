"""What is expected of all live batches: their order, and when each will have ended."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from conserve.batch import deadlines
from conserve.batch.deadlines import BatchView, LiveDeadlineState, RecentHarvest
from conserve.batch.shares import Levels, Standing


@dataclass(frozen=True, slots=True)
class Prospect:
    """What is expected of one live batch. `finish_at` is None while there is no rate.

    is_urgent: it goes before other owners' batches, too.
    level: its owner's; line_cost: what one of its lines adds to that.
    num_waiting: its lines that are not in flight, as far as is known.
    """

    view: BatchView
    finish_at: float | None
    state: LiveDeadlineState
    is_urgent: bool = False
    level: float = 0.0
    line_cost: float = 1.0
    num_waiting: int = 1

    @property
    def engine_priority(self) -> int:
        return deadlines.engine_priority(self.view, is_urgent=self.is_urgent)


@dataclass(frozen=True, slots=True)
class Outlook:
    """All live batches at one moment: prospects by id, each owner's in the order they are fed in.

    floors: of owners who had so little that they count as having had this much.
    """

    now_s: float
    harvest: RecentHarvest
    prospects: Mapping[str, Prospect]
    floors: Mapping[str, float] = field(default_factory=dict)

    @property
    def counted(self) -> set[str]:
        """Batches whose lines are known."""
        return {name for name, each in self.prospects.items() if each.view.num_left}

    @classmethod
    def over(
        cls,
        views: Iterable[BatchView],
        now_s: float,
        harvest: RecentHarvest,
        standing: Standing | None = None,
        together: Collection[str] | None = (),
    ) -> Outlook:
        """Batches of one model are reckoned by themselves: others run on other servers. Not so
        those of the models `together`, names and adapters of one server; None is any model."""
        standing = standing or Standing()
        races: dict[str | bool | None, list[BatchView]] = defaultdict(list)
        for view in deadlines.order(views, now_s, harvest):
            is_together = together is None or view.model in together
            races[is_together or view.model].append(view)
        prospects, floors = dict[str, Prospect](), dict[str, float]()
        for ordered in races.values():
            race = _Race.of(ordered, now_s, harvest, standing)
            prospects |= {each.view.batch_id: each for each in race.prospects()}
            floors |= race.floors()
        return cls(now_s, harvest, prospects, floors)


@dataclass(frozen=True, slots=True)
class _Race:
    """Batches that the same servers run, in the order of deadlines."""

    ordered: Sequence[BatchView]
    now_s: float
    harvest: RecentHarvest
    standing: Standing
    levels: Levels

    @classmethod
    def of(
        cls, ordered: Sequence[BatchView], now_s: float, harvest: RecentHarvest, standing: Standing
    ) -> _Race:
        with_work = [view for view in ordered if view.remaining_tokens > 0 and not view.is_paused]
        levels = Levels.of(with_work or ordered, standing, harvest)
        return cls(ordered, now_s, harvest, standing, levels)

    def floors(self) -> dict[str, float]:
        served = self.standing.served
        return {
            tenant: self.levels.floor
            for tenant in self.levels.by_tenant
            if served.get(tenant, 0.0) < self.levels.floor
        }

    def prospects(self) -> Iterator[Prospect]:
        running = [view for view in self.ordered if not view.is_paused]
        urgent = {view.batch_id for view in running if self._is_urgent(view)}
        first = [view for view in running if view.batch_id in urgent]
        others = [view for view in running if view.batch_id not in urgent]
        ahead = 0.0
        for view in first:
            ahead += view.remaining_tokens
            yield self._prospect(view, ahead, is_urgent=True)
        for view, tokens in zip(others, self._shared(others), strict=True):
            yield self._prospect(view, ahead + tokens, is_urgent=False)
        for view in self.ordered:
            if view.is_paused:
                yield self._prospect(view, None, is_urgent=False)

    def _is_urgent(self, view: BatchView) -> bool:
        at_risk = deadlines.is_at_risk(view, self.now_s, self.harvest)
        hopeless = deadlines.is_hopeless(view, self.now_s, self.harvest)
        known = view.tenant in self.levels.by_tenant
        return known and at_risk and not hopeless and self.levels.may_hurry(view.tenant)

    def _shared(self, views: Sequence[BatchView]) -> list[float]:
        """Tokens that all owners together have had when each of the batches has ended: an owner's
        go one after the other, and owners beside each other, the lower from its level on."""
        levels, lowest = self.levels.by_tenant, self.levels.lowest
        work = dict[str, float]()
        ends = []
        for view in views:
            share = self.standing.share_of(view.tenant)
            work[view.tenant] = work.get(view.tenant, 0.0) + view.remaining_tokens
            ends.append(levels.get(view.tenant, lowest) + work[view.tenant] / share)
        slopes = []
        for tenant, tokens in work.items():
            share, start = self.standing.share_of(tenant), levels.get(tenant, lowest)
            slopes += [(start, share), (start + tokens / share, -share)]
        return _tokens_at(ends, slopes)

    def _prospect(self, view: BatchView, tokens: float | None, *, is_urgent: bool) -> Prospect:
        """`tokens`: what all have had when the batch ends; None where nobody knows when."""
        finish_at = None
        if tokens is not None and self.harvest.tokens_per_s:
            finish_at = self.now_s + deadlines.work_s(tokens, self.harvest)
        num_running = self.standing.num_running.get(view.batch_id, 0)
        return Prospect(
            view,
            finish_at,
            deadlines.deadline_state(view, finish_at, self.now_s, self.harvest),
            is_urgent,
            self.levels.by_tenant.get(view.tenant, 0.0),
            self.standing.line_cost(view),
            max(1, view.num_left - num_running),
        )


def _tokens_at(levels: Sequence[float], slopes: Sequence[tuple[float, float]]) -> list[float]:
    """The sum of lines that bend at the given places, by so much each, at each of the levels."""
    found = [0.0] * len(levels)
    bends = sorted(slopes)
    at = tokens = slope = 0.0
    next_bend = 0
    for index in sorted(range(len(levels)), key=levels.__getitem__):
        while next_bend < len(bends) and bends[next_bend][0] <= levels[index]:
            place, change = bends[next_bend]
            tokens += slope * (place - at)
            at, slope, next_bend = place, slope + change, next_bend + 1
        found[index] = tokens + slope * (levels[index] - at)
    return found
