"""Checks the plugin on the host and its entry in the CNI configuration, and changes neither."""

from typing import Any

from bpf.errors import SidestepError
from installer.host import plugin
from installer.host.chain import PLUGIN, Document, entry_of
from installer.host.confdir import ConfDirectory
from installer.host.rival import in_the_way, serving_rival
from installer.settings import Chain, Node, Shadow


def chain_of(chain: Chain, node: Node, shadow: Shadow) -> dict[str, Any]:
    """The plugin file and its entry: the place of each by these settings, and what is wrong with it ("": nothing).

    `is_ours` is whether the agent of these settings installs them. `rival` says that istio-cni is in the way;
    in shadow mode it `may_stand_by`.
    """
    whole = {"is_ours": chain.install, "may_stand_by": shadow.shadow}
    return {**whole, "plugin": _plugin(chain), "entry": _entry(chain, node)}


def _plugin(chain: Chain) -> dict[str, Any]:
    try:
        fault = plugin.fault_of_plugin(chain.shim, chain.mounted_cni_bin_dir)
    except SidestepError as error:
        fault = f"cannot be checked: {error}"
    return {"file": str(chain.mounted_cni_bin_dir / PLUGIN), "fault": fault}


def _entry(chain: Chain, node: Node) -> dict[str, Any]:
    directory = ConfDirectory(chain, entry_of(node))
    try:
        place = directory.examine()
        files = [str(directory.path / file) for file in directory.holding()]
        replaced = directory.replaced()
    except SidestepError as error:
        return {"file": None, "fault": f"cannot be checked: {error}", "found_in": [], "rival": "", "remarks": []}
    rival, remark = _about_istio_cni(replaced, node)
    return {
        "file": str(directory.path / place.file),
        "fault": place.fault,
        "found_in": files,
        "rival": rival,
        "remarks": [*place.remarks, *([remark] if remark else [])],
    }


def _about_istio_cni(entries: list[tuple[str, Document]], node: Node) -> tuple[str, str]:
    """Whose plugin captures new pods, if istio-cni's is in the chain: that its agent is in the way, or a remark."""
    if not entries:
        return "", ""
    if serving_rival((entry for _, entry in entries), node.proc):
        return in_the_way(entries[0][0]), ""
    remark = (
        f"istio-cni's plugin is in {entries[0][0]}, but its agent does not run: an agent of sidestep takes its place"
    )
    return "", remark
