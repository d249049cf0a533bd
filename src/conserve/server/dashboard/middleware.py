"""ASGI middleware that puts the live page on the app it is named for.

Works in `conserve serve` and, by name, under plain vLLM:
`vllm serve --middleware conserve.server.dashboard.middleware.DashboardMiddleware`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI

from conserve.engine.launch import CONNECTOR, MULTI
from conserve.engine.promises import ask_targets
from conserve.engine.settings import EngineSettings
from conserve.metrics.machine_targets import ChosenTargets
from conserve.server.batches.routes import service_of
from conserve.server.dashboard.access import Guard
from conserve.server.dashboard.collector import Collector
from conserve.server.dashboard.messages import Facts
from conserve.server.dashboard.routes import attach_dashboard
from conserve.server.dashboard.status import Status
from conserve.server.dashboard.steady import steady_clock
from conserve.server.keys import api_keys
from conserve.server.lifespan import LifespanMiddleware, running
from conserve.server.series import narrowed
from conserve.server.shutdown import before_shutdown


class DashboardMiddleware(LifespanMiddleware):
    """Brings the collector and the routes. The batch service, if there is one, is there by then."""

    def inside(self, app: FastAPI) -> AbstractAsyncContextManager[None]:
        return _dashboard(app)


@asynccontextmanager
async def _dashboard(app: FastAPI) -> AsyncIterator[None]:
    from conserve.server import door

    args, engine, service = app.state.args, app.state.engine_client, service_of(app)
    status = Status(
        engine_dead=lambda: bool(engine.errored),
        leaving=lambda: bool(getattr(getattr(app.state, "server", None), "should_exit", False)),
    )
    registry = narrowed(door.metrics_registry())
    clock = steady_clock()
    chosen = await ask_targets(engine, EngineSettings.of(engine.vllm_config.additional_config))
    about = facts(args, engine.vllm_config, chosen, clock(), has_batches=service is not None)
    collector = Collector(registry, about, status, clock)
    attach_dashboard(app, collector, Guard(api_keys(args)), service)
    async with running(collector.run(), "conserve-dashboard"):
        with before_shutdown(engine, status.drain):
            yield


def facts(
    args: Any, config: Any, chosen: ChosenTargets, started_s: float, *, has_batches: bool
) -> Facts:
    from conserve.server import door

    names = args.served_model_name or [args.model]
    carrier = getattr(config.kv_transfer_config, "kv_connector", None)
    parallel = config.parallel_config
    return Facts(
        model=str(names[0]),
        version=door.version(),
        ttft_target_s=chosen.targets.ttft_s,
        tbt_target_s=chosen.targets.tbt_s,
        started_s=started_s,
        ttft_target_reason=chosen.ttft_reason,
        tbt_target_reason=chosen.tbt_reason,
        num_processes=parallel._api_process_count,
        num_engines=parallel.data_parallel_size,
        has_figures=carrier in (CONNECTOR, MULTI) and not args.disable_log_stats,
        has_batches=has_batches,
        needs_key=bool(api_keys(args)),
    )
