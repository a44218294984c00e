"""Undoes on this node what the agent has done: chain entry first, so that no pod calls a plugin that is gone."""

import time

import structlog

from bpf.attachment import detach
from installer.host import files, plugin
from installer.host.chain import entry_of
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


def uninstall(attachment: Attachment, node: Node, chain: Chain) -> list[str]:
    """Remove conf entry, shim, links and pins; returns a sentence for each that was there. Twice is fine.

    Live connections go on, new ones are not captured. Raises FileRefused, KernelRefused.
    """
    done = []
    if chain.mounted_cni_net_dir.is_dir():
        files.clear_leftovers(chain.mounted_cni_net_dir)
        for file in ConfDirectory(chain, entry_of(node)).leave():
            done.append(f"plugin removed from {chain.mounted_cni_net_dir / file}")
    if chain.mounted_cni_bin_dir.is_dir():
        files.clear_leftovers(chain.mounted_cni_bin_dir)
        if plugin.take_away(chain.mounted_cni_bin_dir):
            done.append(f"{chain.mounted_cni_bin_dir / 'sidestep-cni'} removed")
    if detach(attachment.pins):
        done.append(f"programs detached, pins in {attachment.pins.top} removed")
    return done


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
