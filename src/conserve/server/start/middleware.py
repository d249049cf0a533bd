"""Which of our middleware the app gets, and what that brings."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
from typing import Any

from conserve.server.errors import BadInputError
from conserve.server.start.address import url_of

DRAINING = "conserve.server.draining.DrainingMiddleware"
DASHBOARD = "conserve.server.dashboard.middleware.DashboardMiddleware"
TIERS = "conserve.server.tiers.ServiceTierMiddleware"
LOGS = "conserve.server.logs.middleware.LogsMiddleware"
REDIRECTS = "conserve.server.redirects.RelativeRedirectsMiddleware"
BATCHES = "conserve.server.batches.middleware.BatchesMiddleware"
USAGE = "conserve.server.usage.middleware.UsageMiddleware"
OURS = (DRAINING, DASHBOARD, TIERS, LOGS, REDIRECTS, BATCHES, USAGE)


def choose_batches(args: argparse.Namespace) -> str:
    """Settle whether files and batches are served, and where they lie; says so.

    Every API process reads the place and the limit from the environment. Raises BadInputError.
    """
    from conserve.server.start.batch_data import (
        DATA_DIR,
        OWNER_LIMITS,
        PREFIX,
        settle_data_dir,
    )

    flag, off = vars(args).pop("data_dir"), vars(args).pop("no_batches")
    max_live, limits = vars(args).pop("max_live_batches"), vars(args).pop("owner_limits")
    if off or args.headless:
        return "off"
    names = args.served_model_name or [args.model_tag]
    if limits is not None:
        os.environ[OWNER_LIMITS] = os.path.abspath(os.path.expanduser(limits))
    folder = settle_data_dir(flag, names[0])
    os.environ[DATA_DIR] = str(folder)
    if max_live is not None:
        os.environ[f"{PREFIX}MAX_LIVE_BATCHES"] = str(max_live)
    if args.enable_prompt_tokens_details is None:
        # Or no answer would say what the prefix cache saved, and no batch's usage.
        args.enable_prompt_tokens_details = True
    args.middleware = [USAGE, BATCHES, *args.middleware]
    return f"in {folder}"


def choose_dashboard(args: argparse.Namespace) -> str:
    """Settle whether the live page is served; says where. To be called after `choose_batches`:
    the page shows the batches of a service that is there when it starts."""
    if vars(args).pop("no_dashboard") or args.headless:
        return "off"
    args.middleware = [DASHBOARD, *args.middleware]
    return url_of(args, "/dashboard")


def check_theirs(args: argparse.Namespace) -> None:
    """Raises BadInputError for one that vLLM would fail at when the model is loaded. One of ours
    named once more, as under plain vLLM, is not added twice."""
    if not args.middleware:
        return
    ours = {_imported(name) for name in OURS}
    theirs = [(name, _imported(name)) for name in args.middleware]
    args.middleware = [name for name, each in theirs if each not in ours]
    for name, each in theirs:
        if not (inspect.isclass(each) or inspect.iscoroutinefunction(each)):
            raise BadInputError(f"--middleware {name} is neither a class nor a coroutine function.")


def _imported(name: str) -> Any:
    module, _, member = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), member)
    except Exception as error:  # a module may raise anything
        raise BadInputError(
            f"--middleware {name} cannot be imported: {error or type(error).__name__}. "
            "Name it as MODULE.NAME, of a module that Python finds."
        ) from error


def add_always(args: argparse.Namespace) -> None:
    """What no flag turns off."""
    # The innermost hears of the end first, and nothing behind it is begun after that.
    args.middleware = [DRAINING, LOGS, REDIRECTS, TIERS, *args.middleware]
