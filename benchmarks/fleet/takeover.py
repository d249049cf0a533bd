"""kill -9 of one of four replicas: how long its lines wait for another."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from typing import Any

from fleet.bench import LINE_S, SLOTS, Bench
from fleet.postgres_load import ask
from fleet.replicas import until

LEASE_S = 3.0
REPLICAS = 4


def takeover(bench: Bench) -> Iterator[dict[str, Any]]:
    for where in ("machines of their own", "one machine"):
        kills = [_kill_one(bench, where) for _ in range(3 if bench.quick else 8)]
        yield {
            "where": where,
            "replicas": REPLICAS,
            "lease_s": LEASE_S,
            "found_s": sorted(round(found_s, 2) for found_s, _, _ in kills),
            "running_again_s": sorted(round(again_s, 2) for _, again_s, _ in kills),
            "lines_held": sorted(held for _, _, held in kills),
        }


def _kill_one(bench: Bench, where: str) -> tuple[float, float, int]:
    """Seconds from the kill until the dead one's lines are free, and until each of them is with
    another or done; and how many lines it held."""
    database = bench.database()
    dsn, folder = bench.server.dsn(database), {}
    if where == "one machine":
        folder = {"data_dir": tempfile.mkdtemp(dir=bench.folder)}
    with bench.fleet(REPLICAS, database, LINE_S, lease_s=LEASE_S, **folder) as fleet:
        fleet[0].submit(2_000 if bench.quick else 5_000)
        victim, worker = fleet[-1], fleet[-1].worker_id
        held = f"SELECT line_no FROM lines WHERE owner = '{worker}'"
        until(lambda: len(ask(dsn, held)) >= SLOTS, "the victim takes no lines")
        victim.kill()
        start = time.monotonic()
        numbers = [row["line_no"] for row in ask(dsn, held)]
        alive = f"SELECT id FROM workers WHERE id = '{worker}'"
        until(lambda: not ask(dsn, alive), "nobody finds the dead")
        found_s = time.monotonic() - start
        listed = ", ".join(map(str, numbers))
        waiting = f"SELECT 1 FROM lines WHERE line_no IN ({listed}) AND state = 'pending'"
        until(lambda: not ask(dsn, waiting), "the dead one's lines wait")
        return found_s, time.monotonic() - start, len(numbers)
