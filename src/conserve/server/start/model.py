"""Which model is served."""

from __future__ import annotations

import argparse
import os

from conserve.server.start import hub
from conserve.server.start.default_model import NAME, default_model


def choose_model(args: argparse.Namespace) -> str:
    """Settle which model is served, the default one included; says which and where it is."""
    from conserve.server import door

    if args.model_tag is None and args.model == door.DEFAULT_MODEL:
        folder = default_model()
        args.model_tag = str(folder)
        args.served_model_name = args.served_model_name or [NAME]
        if args.enforce_eager is None and door.on_cpu():
            # Compiling this model makes it 1.1 to 1.3 times as fast and every start 40 s longer.
            args.enforce_eager = True
    else:
        args.model_tag = args.model_tag or args.model
        hub.check_model(args.model_tag, args.revision)
    if hub.is_local(args.model_tag) and "HF_HUB_OFFLINE" not in os.environ:
        os.environ["HF_HUB_OFFLINE"] = "1"
        door.stay_offline()
    names = args.served_model_name
    return f"{names[0]} ({args.model_tag})" if names else str(args.model_tag)
