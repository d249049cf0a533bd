"""Where the server listens."""

from __future__ import annotations

import argparse
import socket

from conserve.server.errors import BadInputError

CONNECT_S = 1.0


def check_port(args: argparse.Namespace) -> None:
    """Raise BadInputError when the address cannot be bound, before minutes of loading."""
    if args.uds or args.headless:
        return
    host = args.host or ""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, args.port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise BadInputError(
                f"cannot listen on port {args.port} of {host or 'this machine'}: {reason}. "
                "Free it, or name another with --port."
            ) from error


def is_open(args: argparse.Namespace) -> bool:
    """Whether the server takes connections."""
    if args.uds:
        family, place = socket.AF_UNIX, args.uds
    else:
        host = reached_at(args.host or "")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        place = (host, args.port)
    with socket.socket(family) as probe:
        probe.settimeout(CONNECT_S)
        try:
            probe.connect(place)
        except OSError:
            return False
    return True


def reached_at(host: str) -> str:
    """Where this machine reaches what listens on `host`, which may mean every address."""
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104


def url_of(args: argparse.Namespace, path: str) -> str:
    """What to open in a browser of this machine; the path alone where the server has a socket
    instead of a port."""
    if args.uds:
        return path
    scheme = "https" if args.ssl_certfile else "http"
    host = args.host if args.host not in (None, "", "0.0.0.0", "::") else "localhost"  # noqa: S104
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}:{args.port}{args.root_path or ''}{path}"
