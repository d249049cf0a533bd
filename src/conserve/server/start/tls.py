"""Whether the server can speak TLS with the files that are named; vLLM looks when the model is
loaded."""

from __future__ import annotations

import argparse
import ssl

from conserve.server.errors import BadInputError

FILES = ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs")
PROMISING = ("ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs")
"""Flags of who believes that connections are safe, or clients known."""


def check(args: argparse.Namespace) -> None:
    """Raises BadInputError, which names the flag."""
    if not args.ssl_certfile:
        for name in PROMISING:
            if getattr(args, name):
                raise BadInputError(
                    f"{_flag(name)} needs --ssl-certfile: without one the server speaks plain HTTP."
                )
        return
    for name in FILES:
        _check_readable(name, getattr(args, name))
    try:
        _load(args)
    except (OSError, ValueError) as error:
        raise BadInputError(
            f"--ssl-certfile, --ssl-keyfile, --ssl-ca-certs, --ssl-cert-reqs or --ssl-ciphers: "
            f"{error}."
        ) from error


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_readable(name: str, path: str | None) -> None:
    if not path:
        return
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise BadInputError(f"{_flag(name)} {path} cannot be read: {error.strerror}.") from error


def _load(args: argparse.Namespace) -> None:
    """As the web server does it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # With a password nobody is asked for one on the terminal.
    context.load_cert_chain(args.ssl_certfile, args.ssl_keyfile, password="")
    context.verify_mode = ssl.VerifyMode(args.ssl_cert_reqs)
    if args.ssl_ca_certs:
        context.load_verify_locations(args.ssl_ca_certs)
    if args.ssl_ciphers:
        context.set_ciphers(args.ssl_ciphers)
