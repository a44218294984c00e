"""The root of every error that a user of sidestep can meet, and the errors of the kernel half.

Each message is one sentence that names the thing, its value, and what would be right.
The command line and the CNI server print it as it stands.
"""


class SidestepError(Exception):
    """Anything that sidestep refuses or fails at; the message is meant for the operator."""


class CompileFailed(SidestepError):
    """The BPF programs did not compile, or the kernel's verifier refused them."""


class KernelRefused(SidestepError):
    """A bpf(2), setns(2) or socket call failed; the message names the call and the `errno`, 0 if unknown."""

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class LibraryMissing(SidestepError):
    """A library of the distribution is not installed; the message names its package."""


class NotAttached(SidestepError):
    """The pins that `sidestep attach` makes are not there, or belong to another layout."""


class TableFull(SidestepError):
    """A BPF map is full; the message names the map and its limit in entries."""
