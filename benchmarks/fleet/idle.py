"""What replicas ask of the database that have nothing to do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from fleet.bench import Bench
from fleet.postgres_load import PostgresLoad


def idle(bench: Bench) -> Iterator[dict[str, Any]]:
    for count in (1, 4, 8):
        database = bench.database()
        with bench.fleet(count, database) as fleet:
            time.sleep(1)
            for each in fleet:
                each.measured()
            load, start = PostgresLoad(bench.server, database), time.monotonic()
            time.sleep(5 if bench.quick else 20)
            spent, wall_s = [each.measured() for each in fleet], time.monotonic() - start
            found = load.read()
        shares = count * wall_s
        yield {
            "replicas": count,
            "statements_per_s_a_replica": sum(one["statements"] for one in spent) / shares,
            "transactions_per_s_a_replica": sum(one["transactions"] for one in spent) / shares,
            "postgres_cpu_ms_per_s_a_replica": found["cpu_s"] / shares * 1000,
            "replica_cpu_ms_per_s": sum(one["cpu_s"] for one in spent) / shares * 1000,
            "connections": found["connections"],
            "costliest": found["costliest"],
        }
