"""What can go wrong, named: each error carries what OpenAI's envelope needs."""

from __future__ import annotations

MAX_CAUSE = 300
"""Characters of what another library says that are worth a line of the log."""


class BatchError(Exception):
    """A request that cannot be granted.

    Attributes:
        status_code: HTTP status of the answer.
        code: a word for programs, or None.
        param: the field at fault, or None.
        retry_after_s: seconds after which trying again makes sense, or None.
        headers: what the answer's headers say beside.
    """

    status_code = 400
    code: str | None = None
    retry_after_s: int | None = None

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers: dict[str, str] = {}
        if code is not None:
            self.code = code

    @property
    def type(self) -> str:
        if self.status_code == 429:
            return "rate_limit_error"
        return "server_error" if self.status_code >= 500 else "invalid_request_error"


class InvalidRequestError(BatchError):
    """A field is wrong; the message names it and the fix."""

    status_code = 400


class NotFoundError(BatchError):
    """No such object, or not the caller's."""

    status_code = 404
    code = "not_found"


class FileTooLargeError(BatchError):
    status_code = 413
    code = "file_too_large"
    param = "file"


class OverLimitError(BatchError):
    """The key has as much as it may have of something; the message names the limit."""

    status_code = 429
    code = "rate_limit_exceeded"
    retry_after_s = 60


class StoreUnavailableError(BatchError):
    """The database or the file store does not answer; nothing was changed for certain."""

    status_code = 503
    code = "store_unavailable"
    retry_after_s = 5

    @property
    def for_log(self) -> str:
        """The message and what it comes from: that is the operator's to know, and no client's."""
        # SQLAlchemy's own error has the statement in it, and with it what people sent.
        cause = getattr(self.__cause__, "orig", None) or self.__cause__
        if cause is None:
            return self.message
        told = " ".join(str(cause).split())[:MAX_CAUSE]
        return f"{self.message} ({type(cause).__name__}: {told})"


class StorageFullError(StoreUnavailableError):
    """The disk that holds uploads or files is full; nothing is left of the upload."""

    code = "storage_full"
    retry_after_s = 60


class BatchSettingsError(Exception):
    """A setting that cannot work here; the message names it and the fix. Raised at start only."""


class BadTransitionError(Exception):
    """Our own bug: a batch was moved along an edge the lifecycle does not have."""


class LeaseLostError(Exception):
    """Somebody else owns the work now; what was computed for it must be dropped."""
