"""The application that a Serve config file names: `import_path: conserve.ray.application:build`."""

from __future__ import annotations

import os
from typing import Any, cast

from ray import serve
from ray.serve import Application, Deployment

from conserve.ray import flags
from conserve.ray.replica import Replica
from conserve.ray.settings import RaySettings, read

DEPLOYMENT = "server"
NO_LIMIT = 1_000_000
"""Of requests that Serve hands to a replica: offline ones wait there for hours, and would keep
chats out. The engine has its own limits."""
HEALTH_TIMEOUT_S = 15.0
DRAIN_S = 60.0
DRAIN_LOOK_S = 1.0


def build(args: dict[str, Any]) -> Application:
    """Serve calls it with what the config file has under `args`. Raises BadInputError."""
    settings = read(args, os.environ)
    deployment = cast(Deployment, serve.deployment(serve.ingress()(Replica), **options(settings)))
    return deployment.bind(settings)


def options(settings: RaySettings) -> dict[str, Any]:
    """Of the deployment; what the config file has under `deployments` wins."""
    return {
        "name": DEPLOYMENT,
        "max_ongoing_requests": NO_LIMIT,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "graceful_shutdown_timeout_s": DRAIN_S,
        "graceful_shutdown_wait_loop_s": DRAIN_LOOK_S,
        "ray_actor_options": {"num_cpus": 1, "num_gpus": flags.num_gpus(settings.flags)},
    }
