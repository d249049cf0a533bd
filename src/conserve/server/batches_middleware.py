"""A name that `--middleware` goes on taking; see `conserve.server.batches.middleware`."""

from conserve.server.batches.middleware import BatchesMiddleware

__all__ = ["BatchesMiddleware"]
