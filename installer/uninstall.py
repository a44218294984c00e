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
from installer import files, plugin
from installer.chain import PLUGIN, entry_of
from installer.confdir import ConfDirectory
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


def uninstall_if_deleted(api: Api, attachment: Attachment, node: Node, chain: Chain) -> None:
    """Called when the agent ends: undo everything if its DaemonSet is being deleted, nothing if it merely stops."""
    if not _is_deleted(api, node.pod_namespace):
        log.info("uninstall.not_wanted", daemonset=f"{node.pod_namespace}/{DAEMONSET}")
        return
    for sentence in uninstall(attachment, node, chain):
        log.info("uninstalled", what=sentence)


def _is_deleted(api: Api, namespace: str) -> bool:
    """When the API server can't be asked nothing is known, and nothing may be undone."""
    for attempt in range(_ATTEMPTS):
        try:
            return api.daemonset_is_gone(namespace, DAEMONSET)
        except ApiFailed as error:
            if error.status not in _NO_RIGHTS:
                log.warning("uninstall.unknown", error=str(error))
                return False
            log.info("uninstall.no_rights", attempt=attempt + 1, error=str(error))
            time.sleep(_PAUSE)
    return True
