"""The flags of a replica's `conserve serve`, as a Serve config file has them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from conserve.server.errors import BadInputError
from conserve.server.start.flags import flags as our_flags
from conserve.server.start.flags import read_early

Flags = Mapping[str, Any]

REFUSED = {
    "config": "put its flags here",
    "model": "it goes one level up, into args.model",
    "uds": "each replica has a port instead",
    "ssl-certfile": "Serve's proxies end TLS, http_options.ssl_certfile",
    "ssl-keyfile": "Serve's proxies end TLS, http_options.ssl_keyfile",
}
"""Flags that a replica sets itself, and what to do instead."""
LOOPBACK = "127.0.0.1"
SIZES = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
"""Whose product is the number of GPUs."""
DRAIN = "shutdown-timeout"
"""Of vLLM's: seconds for what has begun."""


def with_dashes(flags: Flags) -> dict[str, Any]:
    """Names as the documentation has them; but `compilation-config.mode` and its like stay."""
    return {
        name if "." in name else name.lstrip("-").replace("_", "-"): value
        for name, value in flags.items()
    }


def check(flags: Flags) -> None:
    """Raises BadInputError for a flag that is the replica's, and for a wrong value of ours; vLLM's
    are judged where it is installed, when a replica starts."""
    for name, instead in REFUSED.items():
        if name in flags:
            raise BadInputError(f"args.flags: leave {name} out: {instead}.")
    port = flags.get("port", 0)
    if not isinstance(port, int) or not 0 <= port < 1 << 16:
        raise BadInputError(f"args.flags.port: must be a port from 1 to 65535, not {port!r}.")
    for name in (*SIZES, DRAIN):
        if not str(flags.get(name) or 0).isdecimal():
            raise BadInputError(f"args.flags.{name}: must be a number, not {flags[name]!r}.")
    takes_value = {flag.name.removeprefix("--") for flag in our_flags() if flag.parse}
    words = [f"--{name}={_text(value)}" for name, value in flags.items() if name in takes_value]
    try:
        read_early(words)
    except BadInputError as error:
        raise BadInputError(f"args.flags: {error}") from error


def write(model: str | None, flags: Flags, folder: Path) -> Path:
    """The file in `folder` that `conserve serve --config` is to read."""
    everything = {"model": model, **flags} if model else flags
    lines = [f"{name}: {_word(value)}\n" for name, value in everything.items() if name != "port"]
    file = folder / "serve.yaml"
    file.write_text("".join(lines), encoding="utf-8")
    return file


def place(flags: Flags, local_rank: int) -> tuple[str, int]:
    """Host of a node's replica of this rank, and the first port that it may take; 0 for any."""
    first = int(flags.get("port") or 0)
    return str(flags.get("host") or LOOPBACK), first + local_rank if first else 0


def drain_s(flags: Flags) -> float:
    """How long a server with these flags goes on when it is told to end."""
    return float(flags.get(DRAIN) or 0)


def num_gpus(flags: Flags) -> int:
    """How many a server with these flags uses: none where vLLM is the one for CPUs."""
    try:
        on_gpus = "cpu" not in version("vllm")
    except PackageNotFoundError:
        on_gpus = False
    return math.prod(int(flags.get(name) or 1) for name in SIZES) if on_gpus else 0


def _text(value: Any) -> str:
    """On a command line."""
    return value if isinstance(value, str) else _word(value)


def _word(value: Any) -> str:
    """In YAML, of which JSON is a part. A boolean is written in the word that may also be meant by
    it, as in `checkpoint: off`; `conserve serve` tells the two apart."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return json.dumps(value, default=str)
