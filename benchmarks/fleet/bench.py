"""What every part of the measurement starts from: one PostgreSQL server, and fleets on it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from fleet.postgres_load import ask
from fleet.replicas import Replica, replicas

from conserve.metrics.percentiles import percentile
from tests.batch.batch_postgres import Postgres

SETTINGS = ("shared_preload_libraries=pg_stat_statements", "max_connections=300")
SLOTS, LINE_S = 16, 0.5
"""Of an engine of known speed: 32 lines a second."""


class Bench:
    """`quick`: fewer lines, fewer kills. The server keeps what it is told (fsync is on)."""

    def __init__(self, folder: Path, *, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        self.server = Postgres(*SETTINGS)

    def database(self) -> str:
        """The name of a new, empty one."""
        name = f"fleet_{uuid4().hex}"
        ask(self.server.dsn("postgres"), f"CREATE DATABASE {name}")
        return name

    @contextmanager
    def fleet(
        self, count: int, database: str | None, line_s: float = 0.0, **settings: Any
    ) -> Iterator[list[Replica]]:
        """Replicas on a database of PostgreSQL, with folders of their own as on machines of their
        own; with None, on one folder and SQLite."""
        place = Path(tempfile.mkdtemp(dir=self.folder))
        if database is None:
            settings["data_dir"] = place / "data"
        else:
            settings["database_url"] = self.server.url(database)
            settings["files_url"] = f"file://{place}/files"
        named = {f"CONSERVE_BATCH_{key.upper()}": str(value) for key, value in settings.items()}
        with replicas(place, count, SLOTS, line_s, named) as fleet:
            yield fleet

    def close(self) -> None:
        self.server.close()


def of_replicas(spent: Sequence[dict[str, Any]], num_lines: int) -> dict[str, Any]:
    """Of what replicas measured while they did so many lines."""
    claims = [each for one in spent for each in one["claims"]]
    records = [each for one in spent for each in one["records"]]
    return {
        "replica_cpu_ms_a_line": sum(one["cpu_s"] for one in spent) / num_lines * 1000,
        "replica_statements_a_line": sum(one["statements"] for one in spent) / num_lines,
        "replica_transactions_a_line": sum(one["transactions"] for one in spent) / num_lines,
        "claims": spread(claims),
        "records": spread(records),
    }


def spread(calls: Sequence[tuple[float, int]]) -> dict[str, float | None]:
    """Milliseconds of calls, and lines in each on average."""
    if not calls:
        return {}
    taken_ms = [seconds * 1000 for seconds, _ in calls]
    return {
        "calls": len(calls),
        "lines_a_call": sum(size for _, size in calls) / len(calls),
        **{f"p{q}_ms": percentile(taken_ms, q) for q in (50, 90, 99)},
        "max_ms": max(taken_ms),
    }


def of_postgres(found: dict[str, Any], num_lines: int) -> dict[str, Any]:
    """Of what the database's server did for so many lines."""
    if not found:
        return {}
    return {
        "postgres_cpu_ms_a_line": found["cpu_s"] / num_lines * 1000,
        "statements_a_line": found["statements"] / num_lines,
        "transactions_a_line": found["transactions"] / num_lines,
        "wal_bytes_a_line": found["wal_bytes"] / num_lines,
        "connections": found["connections"],
        "waits": found["waits"],
        "costliest": found["costliest"],
    }
