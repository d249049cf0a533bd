"""What the scheduler asks of the copiers in one step, and what they report back."""

from __future__ import annotations

from dataclasses import dataclass, field

from conserve.engine.door import KVConnectorWorkerMetadata


@dataclass(slots=True)
class Job:
    """Blocks of one request, device to slots (`store`) or slots to device. Pairwise."""

    number: int
    store: bool
    block_ids: list[int]
    slots: list[int]
    ranges: list[tuple[int, int]] = field(default_factory=list)
    """Tokens [start, stop) of each block; empty stands for whole blocks."""


@dataclass(slots=True)
class Orders:
    """For one step. Before its forward begins, a worker queues the moves and then the jobs behind
    everything that was queued before, drops what is to be dropped, and waits."""

    num_slots: int = 0
    """Of the pool, on every rank; 0 while nothing is kept, or not yet."""
    hold_still: bool = False
    """Steps are being timed: go on making the pool when they are over."""
    give_back: bool = False
    """Nothing is kept any more, on any rank: end every copy, and give back what they have taken."""
    drop: list[int] = field(default_factory=list)
    """Jobs not to be begun, nor gone on with: their blocks are about to change hands."""
    moves: list[tuple[int, int]] = field(default_factory=list)
    """(from slot, to slot)."""
    jobs: list[Job] = field(default_factory=list)
    wait: list[int] = field(default_factory=list)
    """Jobs that must be over before the forward, since it may write to their blocks: copies to the
    host, and copies back that are dropped."""


@dataclass(slots=True)
class Ended:
    """How one job ended, summed over the ranks that have reported."""

    num_ranks: int = 1
    dropped: bool = False
    failed_slots: set[int] = field(default_factory=set)
    num_bytes: int = 0
    seconds: float = 0.0
    """The slowest rank's."""

    def add(self, other: Ended) -> None:
        """Count another rank's end of the same job."""
        self.num_ranks += other.num_ranks
        self.dropped |= other.dropped
        self.failed_slots |= other.failed_slots
        self.num_bytes += other.num_bytes
        self.seconds = max(self.seconds, other.seconds)


@dataclass
class Report(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What has ended on a worker since its last report."""

    ended: dict[int, Ended] = field(default_factory=dict)
    """By job number."""
    lost_slots: set[int] = field(default_factory=set)
    """Slots that a move failed to fill."""
    wait_s: float = 0.0
    """How long forwards waited for copies."""
    pools: list[int] = field(default_factory=list)
    """Slots of a pool that is there, reported once by each rank."""
    bytes_per_s: float = 0.0
    """Speed of copies to the host, measured with it."""
    unusable: str = ""
    """Why this worker can keep no checkpoints, or none any more; nothing else matters then."""

    def aggregate(self, other: Report) -> Report:
        for number, theirs in other.ended.items():
            self.ended.setdefault(number, Ended(num_ranks=0)).add(theirs)
        self.lost_slots |= other.lost_slots
        self.wait_s = max(self.wait_s, other.wait_s)
        self.pools += other.pools
        speeds = [speed for speed in (self.bytes_per_s, other.bytes_per_s) if speed]
        self.bytes_per_s = min(speeds, default=0.0)
        self.unusable = self.unusable or other.unusable
        return self

    def is_empty(self) -> bool:
        return self == Report()
