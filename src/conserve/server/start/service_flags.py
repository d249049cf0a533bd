"""Our flags of what is served beside vLLM's routes, and of the log."""

from __future__ import annotations

from conserve.engine.versions import FLAG, TRIED
from conserve.server.start import values
from conserve.server.start.flag import Flag

SERVICE_FLAGS = (
    Flag(
        "--data-dir",
        values.folder,
        None,
        "DIR",
        "Folder for files and batches: the uploads, the results and their database. Servers "
        "of one machine that share one share the work of each model they have in common. By "
        "default a folder of the model's own in $XDG_DATA_HOME/conserve.",
    ),
    Flag(
        "--max-live-batches",
        values.count,
        None,
        "N",
        "Batches of one API key that have not ended, 1000 by default; more are refused with "
        "status 429 until one ends.",
    ),
    Flag(
        "--owner-limits",
        values.file,
        None,
        "FILE",
        "JSON file of what each API key may have queued and stored, and its share of the "
        "harvest beside others'. Without it shares are equal; read again when it changes.",
    ),
    Flag(
        "--no-batches",
        None,
        False,
        "",
        "Serve no /v1/files and /v1/batches, and write no data folder.",
    ),
    Flag(
        "--no-dashboard",
        None,
        False,
        "",
        "Serve no /dashboard, the live page, and keep no history for it.",
    ),
    Flag(
        "--log-interval-s",
        values.interval,
        60.0,
        "SECONDS",
        "Seconds between two lines of what matters: latency against the targets, harvest, "
        "stops, batches. Nothing is logged while the server is idle; 0 logs none at all.",
    ),
    Flag(
        "--log-json",
        None,
        False,
        "",
        "Log one JSON object a line, in every process of the server.",
    ),
    Flag(
        FLAG,
        None,
        False,
        "",
        f"Serve with a vLLM that ConServe is not tried with (it is with {', '.join(TRIED)}): "
        "outputs may be wrong, and steps fail.",
    ),
)
