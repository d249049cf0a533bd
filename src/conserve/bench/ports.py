"""Ports for servers that are started without one."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from itertools import count, islice

NUM_TRIED = 100
FIRST, NUM_PORTS = 10_000, 20_000
"""Below the ports that kernels give to outgoing connections (Linux from 32768 on, others from
49152), one of which would be taken while the server starts."""
_next = count(os.getpid() * 97)
"""No two calls look at the same port first, and hardly any two processes."""


def free_port(host: str = "127.0.0.1", first: int = 0) -> int:
    """A port of `host` on which nobody listens: the first from `first` on, or any where that is 0.
    Raises OSError where none of NUM_TRIED is, or `host` is not this machine's."""
    numbers = count(first) if first else (FIRST + number % NUM_PORTS for number in _next)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in islice(numbers, NUM_TRIED):
        with socket.socket(family) as probe, suppress(OSError, OverflowError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return port
    raise OSError(f"no port of {host} is free")
