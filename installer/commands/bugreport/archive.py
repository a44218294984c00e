"""The archive itself: a folder with a page that says what is in it."""

import io
import tarfile
import time
from collections.abc import Iterable

from installer.commands.bugreport.parts import Part

_ABOUT = """A bug report of sidestep, made on {node} at {when}.

It has names, namespaces, addresses and annotations of mesh pods, and of no others; the agent's last log lines; and the
node's CNI configuration, in which values that may be secret are left out. It has no environment of pods, no Secrets, no
payload of connections. Read it before you pass it on.

{parts}
"""


def archive(node: str, found: Iterable[Part]) -> bytes:
    """A gzipped tar archive of the parts, below a folder with the node's name."""
    folder = f"sidestep-bugreport-{node}"
    every = list(found)
    widest = max(len(each.name) for each in every)
    listed = "\n".join(f"{each.name:{widest}}  {each.what}" for each in every)
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    about = Part("README.txt", "", _ABOUT.format(node=node, when=when, parts=listed).encode())
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for each in (about, *every):
            entry = tarfile.TarInfo(f"{folder}/{each.name}")
            entry.size, entry.mtime, entry.mode = len(each.content), int(time.time()), 0o600
            tar.addfile(entry, io.BytesIO(each.content))
    return made.getvalue()
