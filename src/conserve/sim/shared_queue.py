"""What one queue costs a fleet: the database's time for each line and replica, and failures.

The figures are measured (`benchmarks/fleet_scale.py`); what follows of them for more replicas than
were there is reckoned here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor


@dataclass(frozen=True, slots=True)
class SharedQueue:
    """line_ms: of the database's processor, to hand one line out and store what came of it.
    replica_ms_per_s: of the same, for a replica that only looks.
    connections_a_replica: kept open.
    takeover_s: from a replica's death until its lines are another's.
    lines_held: by a replica at a time; those of a dead one run again.
    num_cores: of the database's machine.
    """

    line_ms: float
    replica_ms_per_s: float
    connections_a_replica: float
    takeover_s: float
    lines_held: float
    num_cores: int

    def most_rps(self, num_replicas: int) -> float:
        """Lines a second that the database has the time for, beside so many replicas' looks."""
        free_ms = 1000.0 * self.num_cores - self.replica_ms_per_s * num_replicas
        return max(0.0, free_ms) / self.line_ms

    def most_replicas(self, replica_rps: float) -> int:
        """How many replicas it bears that run so many lines a second each."""
        return floor(1000.0 * self.num_cores / (self.replica_ms_per_s + self.line_ms * replica_rps))


@dataclass(frozen=True, slots=True)
class Failures:
    """Each replica fails once in `mtbf_s` on average, at any moment, and is back `away_s` later."""

    mtbf_s: float
    away_s: float

    @property
    def share_up(self) -> float:
        return self.mtbf_s / (self.mtbf_s + self.away_s)

    def redone_rps(self, num_replicas: int, queue: SharedQueue) -> float:
        """Lines a second that run again, because the replica that ran them died. All that it held
        count as run to their end: more than they were."""
        return num_replicas * self.share_up / self.mtbf_s * queue.lines_held
