"""A name that `--middleware` goes on taking; see `conserve.server.logs.middleware`."""

from conserve.server.logs.middleware import LogsMiddleware

__all__ = ["LogsMiddleware"]
