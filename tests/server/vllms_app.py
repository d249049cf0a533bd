"""vLLM's app as far as our middleware sees it: its state, its life, its way of naming classes."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Any

from fastapi import FastAPI


def engine_config(**parallel: Any) -> Namespace:
    """What is read of vLLM's config; `parallel` overrides its parallel part."""
    alone = {
        "data_parallel_size": 1,
        "local_engines_only": False,
        "_api_process_count": 1,
        "_api_process_rank": 0,
    }
    return Namespace(
        additional_config={"conserve": {"slo_ttft_s": 0.5}},
        kv_transfer_config=Namespace(kv_connector="ConserveConnector"),
        scheduler_config=Namespace(max_num_seqs=64, max_num_queued_reqs=None),
        parallel_config=Namespace(**{**alone, **parallel}),
        device_config=Namespace(device_type="cuda"),
        shutdown_timeout=0,
    )


class Outputs:
    """The requests in flight, as far as they can be told of an error."""

    def __init__(self) -> None:
        self.error: asyncio.Future[Exception] | None = None

    def propagate_error(self, error: Exception) -> None:
        if self.error is not None:
            self.error.set_result(error)


class Core:
    """The client's way to the engine's process, started by itself."""

    def __init__(self, told: list[Any] | None) -> None:
        self.resources = Namespace(engine_manager=object())
        self._told = told

    async def call_utility_async(self, method: str) -> Any:
        assert method == "conserve_targets"
        return self._told


class Engine:
    """The engine's client: notes when it is shut down."""

    def __init__(self, config: Namespace, told: list[Any] | None = None) -> None:
        """`told`: what its core answers when it is asked for its targets."""
        self.vllm_config = config
        self.engine_core: Any = Core(told)
        self.errored = False
        self.shutdowns: list[float | None] = []
        self.output_processor = Outputs()

    def shutdown(self, timeout: float | None = None) -> None:
        self.shutdowns.append(timeout)

    def generate(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("these tests ask nothing of the engine")

    @property
    def is_itself(self) -> bool:
        """Whether nobody stands before `shutdown`."""
        return "shutdown" not in vars(self)


def vllms_app(engine: Engine, **args: Any) -> FastAPI:
    app = FastAPI()
    app.state.engine_client = engine
    given = {"api_key": None, "served_model_name": None, "model": "org/m"}
    app.state.args = Namespace(**{**given, "disable_log_stats": False, **args})
    return app


def named(middleware: str) -> Any:
    """The class that `--middleware` names, found as vLLM finds it."""
    module, _, name = middleware.rpartition(".")
    return getattr(import_module(module), name)


@asynccontextmanager
async def started(app: FastAPI) -> AsyncIterator[None]:
    """The app between start-up and shutdown, through its middleware, as a web server does it."""
    said: asyncio.Queue[Any] = asyncio.Queue()
    heard: asyncio.Queue[Any] = asyncio.Queue()
    running = asyncio.create_task(app({"type": "lifespan", "state": {}}, said.get, heard.put))
    await said.put({"type": "lifespan.startup"})
    assert (await heard.get())["type"] == "lifespan.startup.complete"
    try:
        yield
    finally:
        await said.put({"type": "lifespan.shutdown"})
        assert (await heard.get())["type"] == "lifespan.shutdown.complete"
        await running
