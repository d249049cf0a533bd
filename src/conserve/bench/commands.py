"""The command that starts an arm's server."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from conserve.bench.arms import Arm
from conserve.core.snapshot import Targets


def server_command(
    arm: Arm, model: str, port: int, args: Sequence[str], targets: Targets, data_dir: Path
) -> list[str]:
    """The command that starts the arm's server; `args` are those every arm gets, and `data_dir` is
    a fresh folder for its batches."""
    shared = ["--port", str(port), "--host", "127.0.0.1", *args, *arm.args]
    if arm.kind == "stock":
        module = "vllm.entrypoints.openai.api_server"
        return [sys.executable, "-m", module, "--model", model, *shared]
    # Batches that wait in the user's data folder must not run in a measurement.
    ours = ["--data-dir", str(data_dir)] if arm.batch else ["--no-batches"]
    ours += ["--slo-ttft-ms", f"{targets.ttft_s * 1000:g}"]
    ours += ["--slo-tbt-ms", f"{targets.tbt_s * 1000:g}"]
    if arm.settings:
        ours += ["--additional-config", json.dumps({"conserve": arm.settings})]
    start = "from conserve.cli.main import main; main()"
    return [sys.executable, "-c", start, "serve", model, *shared, *ours]
