"""What a PostgreSQL server does for its clients: statements, log, processor time, waits."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from contextlib import suppress
from typing import Any

import asyncpg
import psutil

from tests.batch.batch_postgres import Postgres

COUNTERS = """
    SELECT (SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = '{0}')
               AS transactions,
           (SELECT wal_bytes FROM pg_stat_wal) AS wal_bytes,
           (SELECT coalesce(sum(calls), 0) FROM pg_stat_statements
            WHERE dbid = (SELECT oid FROM pg_database WHERE datname = '{0}')) AS statements
"""
COSTLIEST = """
    SELECT query, calls, total_exec_time / 1000 AS seconds, rows
    FROM pg_stat_statements
    WHERE dbid = (SELECT oid FROM pg_database WHERE datname = '{0}')
    ORDER BY total_exec_time DESC LIMIT 12
"""
WAITS = """
    SELECT CASE WHEN state = 'active'
                THEN coalesce(wait_event_type || '/' || wait_event, 'running')
                ELSE state END AS wait
    FROM pg_stat_activity WHERE datname = '{0}'
"""
SIZES = """
    SELECT relname, pg_relation_size(oid) AS table_bytes, pg_indexes_size(oid) AS index_bytes,
           pg_total_relation_size(oid) AS bytes
    FROM pg_class WHERE relname IN ('lines', 'results')
"""
SAMPLE_S = 0.1


def ask(dsn: str, query: str) -> list[dict[str, Any]]:
    async def fetch() -> list[dict[str, Any]]:
        connection = await asyncpg.connect(dsn)
        try:
            return [dict(row) for row in await connection.fetch(query)]
        finally:
            await connection.close()

    return asyncio.run(fetch())


class PostgresLoad:
    """Meters one database from construction to `read`; nothing else may use the server. It looks
    from another database, so that its own looks do not count."""

    def __init__(self, server: Postgres, database: str) -> None:
        self._server, self._dsn, self._database = server, server.dsn("postgres"), database
        self._waits, self._most_connections = Counter[str](), 0
        self._over = threading.Event()
        ask(self._dsn, "CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
        ask(self._dsn, "SELECT pg_stat_statements_reset()")
        self._before = self._counters()
        self._cpu_before_s = self._cpu_s()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._sample()), daemon=True)
        self._thread.start()

    def read(self) -> dict[str, Any]:
        """Totals since construction; `waits` is how often a connection was seen at what."""
        cpu_s = self._cpu_s() - self._cpu_before_s
        after = self._counters()
        self._over.set()
        self._thread.join()
        totals = {name: after[name] - self._before[name] for name in after}
        costliest = self._ask(COSTLIEST)
        return {
            **totals,
            "cpu_s": cpu_s,
            "connections": self._most_connections,
            "waits": dict(self._waits.most_common(8)),
            "costliest": [row | {"query": " ".join(row["query"].split())} for row in costliest],
        }

    def _ask(self, query: str) -> list[dict[str, Any]]:
        return ask(self._dsn, query.format(self._database))

    def _counters(self) -> dict[str, float]:
        (row,) = self._ask(COUNTERS)
        return {name: float(value) for name, value in row.items()}

    def _cpu_s(self) -> float:
        """Of the server, its living children, and those it has waited for."""
        pid = int((self._server.folder / "data" / "postmaster.pid").read_text().split()[0])
        parent = psutil.Process(pid)
        times = parent.cpu_times()
        total = times.user + times.system + times.children_user + times.children_system
        for child in parent.children():
            with suppress(psutil.NoSuchProcess):
                spent = child.cpu_times()
                total += spent.user + spent.system
        return float(total)

    async def _sample(self) -> None:
        connection = await asyncpg.connect(self._dsn)
        try:
            while not self._over.is_set():
                rows = await connection.fetch(WAITS.format(self._database))
                self._waits.update(row["wait"] for row in rows)
                self._most_connections = max(self._most_connections, len(rows))
                await asyncio.sleep(SAMPLE_S)
        finally:
            await connection.close()
