"""Lines a second: with engines that answer at once, and out of engines of known speed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from fleet.bench import LINE_S, SLOTS, Bench, of_postgres, of_replicas
from fleet.postgres_load import PostgresLoad
from fleet.replicas import Replica, until

CASES = [
    ("sqlite", 1, 1),
    ("sqlite", 2, 1),
    ("postgres", 1, 1),
    ("postgres", 2, 1),
    ("postgres", 4, 1),
    ("postgres", 8, 1),
    ("postgres", 8, 8),
]
"""Database, replicas, and keys with a batch each."""
FIRST, LAST = 0.1, 0.9
"""The shares of all lines between which is measured: all are busy, and no file is written."""


def hand_out(bench: Bench) -> Iterator[dict[str, Any]]:
    num_lines = 4_000 if bench.quick else 20_000
    for kind, count, keys in CASES:
        database = bench.database() if kind == "postgres" else None
        with bench.fleet(count, database) as fleet:
            # Several are still sent while the first ones run.
            lines_a_key = num_lines if keys == 1 else num_lines // 4
            measured = _middle(bench, fleet, database, lines_a_key, keys)
        yield {"database": kind, "replicas": count, "keys": keys, **measured}


def engines(bench: Bench) -> Iterator[dict[str, Any]]:
    for count in (2, 4, 8):
        speed = SLOTS / LINE_S * count
        num_lines = round(speed * (10 if bench.quick else 30))
        database = bench.database()
        with bench.fleet(count, database, LINE_S) as fleet:
            measured = _middle(bench, fleet, database, num_lines, 1)
        yield {"replicas": count, "engines_lines_per_s": speed, **measured}


def _middle(
    bench: Bench, fleet: list[Replica], database: str | None, lines_a_key: int, keys: int
) -> dict[str, Any]:
    """What happens between the FIRST and the LAST part of all lines."""
    named = [f"key-{number}" for number in range(keys)]
    batches = {key: fleet[0].submit(lines_a_key, key) for key in named}
    total = lines_a_key * keys

    def num_done() -> int:
        found = (fleet[0].batch(batches[key], key) for key in named)
        return sum(each["request_counts"]["completed"] for each in found)

    until(lambda: num_done() >= FIRST * total, "the lines do not begin")
    load = PostgresLoad(bench.server, database) if database else None
    for each in fleet:
        each.measured()
    start, before = time.monotonic(), num_done()
    until(lambda: num_done() >= LAST * total, "the lines do not end", every_s=0.1)
    wall_s, lines = time.monotonic() - start, num_done() - before
    spent, found = [each.measured() for each in fleet], load.read() if load else {}
    done = {"lines": lines, "lines_per_s": lines / wall_s}
    return done | of_replicas(spent, lines) | of_postgres(found, lines)
