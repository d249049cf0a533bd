"""Where the server listens."""

from __future__ import annotations

import argparse
import os
import socket
import stat

from conserve.server.errors import BadInputError

CONNECT_S = 1.0
SOCKETS = "/proc/net/unix"
"""All that this machine's processes have, whose names may be of any bytes."""


def check_address(args: argparse.Namespace) -> None:
    """Raise BadInputError when the address cannot be bound, before minutes of loading."""
    if args.headless:
        return
    if args.uds:
        check_socket(args.uds)
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


def check_socket(place: str) -> None:
    """The same for a socket's path; takes away what a server that is gone has left there, at which
    vLLM would fail."""
    try:
        if is_left_over(place):
            os.unlink(place)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(place)
        os.unlink(place)
    except OSError as error:
        raise BadInputError(
            f"cannot listen on --uds {place}: {error.strerror or error}. Name another path, or "
            "end the server that has it."
        ) from error


def is_left_over(place: str) -> bool:
    """Whether it is a socket that nobody has any more. A server that still starts has its socket,
    and takes no connection: so the kernel is asked."""
    if not os.path.exists(place) or not stat.S_ISSOCK(os.stat(place).st_mode):
        return False
    if _takes(socket.AF_UNIX, place):
        return False
    try:
        with open(SOCKETS, errors="replace") as sockets:
            paths = [line.split(maxsplit=7)[7:] for line in sockets]
    except OSError:
        return False  # nobody tells
    # A path that is not absolute may be anybody's of that name.
    own = {os.path.abspath(place), os.path.basename(place)}
    names = [path[0].strip() for path in paths if path]
    return not any((one if one[:1] == "/" else os.path.basename(one)) in own for one in names)


def is_open(args: argparse.Namespace) -> bool:
    """Whether the server takes connections."""
    if args.uds:
        return _takes(socket.AF_UNIX, args.uds)
    host = reached_at(args.host or "")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return _takes(family, (host, args.port))


def _takes(family: int, place: str | tuple[str, int]) -> bool:
    """Whether somebody takes connections there."""
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
