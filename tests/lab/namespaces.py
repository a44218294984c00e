"""Opening one network namespace of the node by its cookie."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cni.netns.namespaces import PROC, find_netns


@contextmanager
def open_netns(cookie: int, inode: int | None = None, proc: Path = PROC) -> Iterator[int | None]:
    """A descriptor of it, None when it is not found."""
    with find_netns({cookie}, None if inode is None else {inode}, proc) as found:
        yield next((fd for _, fd in found), None)
