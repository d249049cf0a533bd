"""One replica: a whole `conserve serve` on this node, and what Ray Serve asks of it."""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from pathlib import Path

import ray
from ray import serve

from conserve.ray import child, flags
from conserve.ray.forward import Forward
from conserve.ray.load import autoscaling_stats
from conserve.ray.settings import RaySettings, check_gpus, check_nodes, check_policy
from conserve.server.asgi import App

logger = logging.getLogger("ray.serve")


class Replica:
    """What `serve.ingress` makes a deployment of. Serve calls every method."""

    def __init__(self, settings: RaySettings) -> None:
        """Raises BadInputError for what the config file has under `deployments`, and for what does
        not fit the cluster."""
        context = serve.get_replica_context()
        check_policy(context._deployment_config.autoscaling_config)
        check_gpus(settings, len(ray.get_gpu_ids()))
        given = ray.get_runtime_context().get_assigned_resources()
        check_nodes(settings, os.environ, given, ray.nodes())
        self._name, self._rank = context.replica_tag, context.rank.local_rank
        self._settings = settings

    async def __serve_build_asgi_app__(self) -> App:
        """Start the server; returns when it answers. Raises ChildEndedError with what is wrong."""
        self._folder = tempfile.TemporaryDirectory(prefix="conserve-ray-")
        folder = Path(self._folder.name)
        config = flags.write(self._settings.model, self._settings.flags, folder)
        host, port = flags.place(self._settings.flags, self._rank)
        port = child.port_of(host, port)
        drain_s = flags.drain_s(self._settings.flags)
        self._child = await child.start(["--config", str(config)], host, port, folder, drain_s)
        await self._child.ready()
        self._guard = asyncio.create_task(self._end_with_child())
        return Forward(self._child.url, self._name, self._stop)

    async def check_health(self) -> None:
        await self._child.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return autoscaling_stats(await self._child.metrics())

    async def _stop(self) -> None:
        """Serve ends an app's life when its requests are done, or have had their time."""
        self._guard.cancel()
        await self._child.stop()
        self._folder.cleanup()

    async def _end_with_child(self) -> None:
        """A replica without its server answers nothing: routers see at once that its process is
        gone, and Serve starts another, which would else take three failed looks at its health."""
        status = await self._child.process.wait()
        logger.error("conserve serve ended with status %s; its replica ends, too", status)
        os._exit(1)
