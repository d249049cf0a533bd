"""What conversations that pause have left behind, and how far back it lies: also what is gone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple


class Found(NamedTuple):
    """Leading blocks that a request asks for again and that were left together."""

    start: int
    """Blocks of the request before them."""
    num_blocks: int
    depth: int
    """How many blocks of history had to be kept, the newest first, for all of them to be there."""


class History:
    """A list of visits, the oldest first, each with the blocks that it left and nobody used since.

    Blocks go by name (what names their content). A name is here however long its block has been
    handed out to others, up to `most` names: so it is known what more memory would have kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._visit_of: dict[Hashable, int] = {}
        self._visits: OrderedDict[int, set[Hashable]] = OrderedDict()
        self._num_visits = 0
        self._lost: set[Hashable] = set()
        """Those whose blocks offline work drove out."""

    def __len__(self) -> int:
        return len(self._visit_of)

    def left(self, names: Iterable[Hashable]) -> None:
        """A request has let go of these: they are the newest. The oldest ones beyond `most` are
        forgotten."""
        names = set(names)
        if not names:
            return
        self.drop(names)
        self._num_visits += 1
        self._visits[self._num_visits] = names
        self._visit_of.update(dict.fromkeys(names, self._num_visits))
        while len(self._visit_of) > self._most:
            self.drop(set(next(iter(self._visits.values()))))

    def drop(self, names: Iterable[Hashable]) -> None:
        """These are history no more: somebody uses them, or nobody ever will."""
        for name in names:
            visit = self._visit_of.pop(name, 0)
            if visit:
                same = self._visits[visit]
                same.discard(name)
                if not same:
                    del self._visits[visit]
                self._lost.discard(name)

    def find(self, names: Sequence[Hashable]) -> list[Found]:
        """Which leading ones of `names` are here, in order, those of one visit together. Costs what
        they do, and the number of visits since the oldest of them."""
        runs: list[list[int]] = []
        for index, name in enumerate(names):
            visit = self._visit_of.get(name, 0)
            if not visit:
                break
            if runs and runs[-1][0] == visit:
                runs[-1][2] += 1
            else:
                runs.append([visit, index, 1])
        newer = self._sizes_of_newer({visit for visit, _, _ in runs})
        # A visit's last blocks are the first of it to go.
        return [Found(start, count, newer[visit] + count) for visit, start, count in runs]

    def _sizes_of_newer(self, wanted: set[int]) -> dict[int, int]:
        """Of each of those visits, how many blocks newer ones left."""
        sizes: dict[int, int] = {}
        total = 0
        for visit in reversed(self._visits):
            if len(sizes) == len(wanted):
                break
            if visit in wanted:
                sizes[visit] = total
            total += len(self._visits[visit])
        return sizes

    def driven_out(self, names: Iterable[Hashable]) -> None:
        """Blocks of these went to offline work, or to others because it held the rest."""
        self._lost.update(name for name in names if name in self._visit_of)

    def num_lost(self, names: Sequence[Hashable], num_cached: int) -> int:
        """Of `names` past the first `num_cached`, leading ones that would be there without offline
        work: the others in between are there, or here."""
        lost = self._lost
        if not lost:
            return 0
        count = 0
        for name in names[num_cached:]:
            if name not in self._visit_of:
                break
            count += name in lost
        return count

    def clear(self) -> None:
        self._visit_of.clear()
        self._visits.clear()
        self._lost.clear()
