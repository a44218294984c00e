"""Undoes on this node what the agent did. The chain entry goes first, so that no pod calls a missing plugin.

An agent whose DaemonSet was deleted takes the plugin away and leaves the pods that run captured, as Istio's rules stay
in running pods too. Only a person ends capture.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bpf.attachment import detach_programs
from bpf.errors import SidestepError
from bpf.holder import holder_of, is_held
from bpf.syscalls import Descriptor
from installer.host import files, plugin
from installer.host.captured import StillCaptured, captured_pods, who_lost_capture
from installer.host.chain import PLUGIN, entry_of
from installer.host.confdir import ConfDirectory
from installer.settings import Attachment, Chain, Node

_END_IT = "delete its DaemonSet, or stop it"


class AgentRunning(SidestepError):
    """Nothing can be undone while an agent runs, because it would put everything back."""


def leave_chain(node: Node, chain: Chain) -> list[str]:
    """Remove chain entry and plugin; returns a sentence for each that was there. Capture goes on.

    May be called again. Raises FileRefused, AgentRunning.
    """
    with _nobody_serving(node.cni_agent_run_dir):
        return _leave_chain(chain, node)


def uninstall_node(attachment: Attachment, node: Node, chain: Chain, end_capture: bool) -> list[str]:
    """Remove chain entry, plugin, links and pins; returns a sentence for each that was there. May be called again.

    Live connections go on; new ones are not captured. Raises FileRefused, KernelRefused, AgentRunning; StillCaptured,
    and then nothing is removed, if pods are captured and `end_capture` is false.
    """
    with _nobody_serving(node.cni_agent_run_dir):
        if is_held(attachment.pins):
            raise AgentRunning(f"an agent uses the pins: {holder_of(attachment.pins)}; first {_END_IT}")
        pods = captured_pods(attachment.pins, node.proc)
        if pods and not end_capture:
            raise StillCaptured(pods, "to remove only the plugin give --keep-capture")
        done = _leave_chain(chain, node)
        if detach_programs(attachment.pins):
            done.append(f"programs detached, pins in {attachment.pins.top} removed")
        if pods:
            done.append(who_lost_capture(pods))
        return done


def _leave_chain(chain: Chain, node: Node) -> list[str]:
    done = []
    if chain.mounted_cni_net_dir.is_dir():
        files.clear_leftovers(chain.mounted_cni_net_dir)
        for file in ConfDirectory(chain, entry_of(node)).leave():
            done.append(f"plugin removed from {chain.mounted_cni_net_dir / file}")
    if chain.mounted_cni_bin_dir.is_dir():
        files.clear_leftovers(chain.mounted_cni_bin_dir)
        if plugin.take_away(chain.mounted_cni_bin_dir):
            done.append(f"{chain.mounted_cni_bin_dir / PLUGIN} removed")
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
            raise AgentRunning(f"an agent serves {run_dir} and would put everything back; first {_END_IT}") from None
        yield
