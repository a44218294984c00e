"""Errors of requests to the API server."""

from bpf.errors import SidestepError


class ApiFailed(SidestepError):
    """The API server could not be reached, or refused; `status` is the HTTP status, 0 if there was no answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Expired(ApiFailed):
    """The server can't list or watch from this resourceVersion (any more): list again."""


class Conflict(ApiFailed):
    """The object has changed since it was read: read it again."""


class NoAccess(ApiFailed):
    """The settings, or the files that they name, do not say how to reach the API server."""
