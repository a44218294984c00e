"""Undoes on this node what the agent has done: chain entry first, so that no pod calls a plugin that is gone."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from bpf.attachment import detach
from bpf.errors import SidestepError
from bpf.pins import Descriptor
from installer.host import files, plugin
from installer.host.chain import PLUGIN, entry_of
from installer.host.confdir import ConfDirectory
from installer.pods.api import Api
from installer.pods.errors import ApiFailed
from installer.settings import Attachment, Chain, Node

log = structlog.get_logger("uninstall")

# Istio's name for it, by which istiod and istioctl find it
DAEMONSET = "istio-cni-node"
# kubectl deletes account and roles together with the DaemonSet, so the question is often refused: for as many attempts
# in a row, seconds apart, that says the same. Well within a pod's 30 s to end
_ATTEMPTS, _PAUSE = 4, 1.0
_NO_RIGHTS = (401, 403)


class AgentRunning(SidestepError):
    """Something was to be undone that a running agent keeps in place."""


def uninstall(attachment: Attachment, node: Node, chain: Chain) -> list[str]:
    """Remove conf entry, shim, links and pins; returns a sentence for each that was there. Twice is fine.

    Live connections go on, new ones are not captured. Raises FileRefused, KernelRefused, AgentRunning.
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
    if detach(attachment.pins):
        done.append(f"programs detached, pins in {attachment.pins.top} removed")
    return done


@contextmanager
def _nobody_serving(run_dir: Path) -> Iterator[None]:
    """Hold the run directory as an agent does (cni/server.py). Raises AgentRunning when one has it."""
    try:
        descriptor = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # never made, or in nobody's use
        yield
        return
    with Descriptor(descriptor):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AgentRunning(
                f"an agent serves {run_dir} and would put everything back; delete its DaemonSet, or stop it, first"
            ) from None
        yield


class Deployment:
    """The DaemonSet that this agent belongs to, if it does: with it goes what the agent has done.

    One that was never seen is none of ours: an agent that runs without a DaemonSet undoes nothing when it ends.
    """

    def __init__(self, api: Api, namespace: str) -> None:
        self._api, self._namespace = api, namespace
        self._seen = False

    def look(self) -> None:
        """Ask once whether it is there; when the API server answers."""
        if not self._seen:
            try:
                self._seen = not self._api.daemonset_is_gone(self._namespace, DAEMONSET)
            except ApiFailed as error:
                log.warning("daemonset.unknown", error=str(error), consequence="deleting it will not uninstall")

    def is_deleted(self) -> bool:
        """Whether it has been, or is being, deleted. When the API server can't be asked nothing may be undone."""
        for attempt in range(_ATTEMPTS if self._seen else 0):
            try:
                return self._api.daemonset_is_gone(self._namespace, DAEMONSET)
            except ApiFailed as error:
                if error.status not in _NO_RIGHTS:
                    log.warning("daemonset.unknown", error=str(error), consequence="nothing is uninstalled")
                    return False
                log.info("daemonset.no_rights", attempt=attempt + 1, error=str(error))
                time.sleep(_PAUSE)
        return self._seen
