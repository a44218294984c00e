"""What the product walks instead of /proc where a test means its own processes, and nobody else's.

/proc has the pods of all tests that run on this machine. An agent that looks for a pod's address among them may find
another test's.
"""

from pathlib import Path

_PROC = Path("/proc")


class OwnProcfs:
    """A directory whose links lead to what /proc has of the processes that are shown, and of the node itself."""

    def __init__(self, path: Path) -> None:
        """`path` is an empty directory."""
        self.path = path
        for name in ("1", "self", "sys"):
            self._link(name)

    def show(self, pid: int) -> None:
        """Make a process one that is seen. Once it has ended it is gone from here as it is from /proc."""
        self.hide(pid)
        self._link(str(pid))

    def hide(self, pid: int) -> None:
        """Before the number becomes another process's."""
        (self.path / str(pid)).unlink(missing_ok=True)

    def _link(self, name: str) -> None:
        (self.path / name).symlink_to(_PROC / name)
