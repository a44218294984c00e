"""Undoes on this node what the agent did. The chain entry goes first, so that no pod calls a missing plugin."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bpf.attachment import detach_programs
from bpf.errors import SidestepError
from bpf.syscalls import Descriptor
from installer.host import files, plugin
from installer.host.chain import PLUGIN, entry_of
from installer.host.confdir import ConfDirectory
from installer.settings import Attachment, Chain, Node


class AgentRunning(SidestepError):
    """Nothing can be undone while an agent runs, because it would put everything back."""


def uninstall_node(attachment: Attachment, node: Node, chain: Chain) -> list[str]:
    """Remove chain entry, plugin, links and pins; returns a sentence for each that was there. May be called again.

    Live connections go on; new ones are not captured. Raises FileRefused, KernelRefused, AgentRunning.
    """
    with _nobody_serving(node.cni_agent_run_dir):
        return _undo(attachment, node, chain)


def _undo(attachment: Attachment, node: Node, chain: Chain) -> list[str]:
    done = []
    if chain.mounted_cni_net_dir.is_dir():
        files.clear_leftovers(chain.mounted_cni_net_dir)
        for file in ConfDirectory(chain, entry_of(node)).leave():
            done.append(f"plugin removed from {chain.mounted_cni_net_dir / file}")
    if chain.mounted_cni_bin_dir.is_dir():
        files.clear_leftovers(chain.mounted_cni_bin_dir)
        if plugin.take_away(chain.mounted_cni_bin_dir):
            done.append(f"{chain.mounted_cni_bin_dir / PLUGIN} removed")
    if detach_programs(attachment.pins):
        done.append(f"programs detached, pins in {attachment.pins.top} removed")
    return done


@contextmanager
def _nobody_serving(run_dir: Path) -> Iterator[None]:
    """Lock the run directory as an agent does (cni/server.py). Raises AgentRunning if an agent holds the lock."""
    try:
        descriptor = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # no such directory, so no agent uses it
        yield
        return
    with Descriptor(descriptor):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AgentRunning(
                f"an agent serves {run_dir} and would put everything back; first delete its DaemonSet, or stop it"
            ) from None
        yield
