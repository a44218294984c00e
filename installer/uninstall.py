"""Undoes on this node what the agent has done: chain entry first, so that no pod calls a plugin that is gone."""

from bpf.attachment import detach
from installer import files, plugin
from installer.chain import entry_of
from installer.confdir import ConfDirectory
from installer.settings import Attachment, Chain, Node


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
