"""What can go wrong between a node and the API server."""

from bpf.errors import SidestepError


class ApiFailed(SidestepError):
    """The API server could not be asked, or said no; `status` is the HTTP status, 0 when there was no answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Expired(ApiFailed):
    """The resourceVersion of a watch is too old for the server: list again."""


class Conflict(ApiFailed):
    """What was to be changed is not as it was seen: look again."""


class NoAccess(ApiFailed):
    """The settings, or what they point to, do not say how to reach the API server."""
