"""The plugin on the host and its place in the CNI configuration, looked at and left alone."""

from typing import Any

from bpf.errors import SidestepError
from installer.host import plugin
from installer.host.chain import PLUGIN, entry_of
from installer.host.confdir import ConfDirectory
from installer.settings import Chain, Node


def chain_of(chain: Chain, node: Node) -> dict[str, Any]:
    """Plugin file and entry: where each is or belongs, and what is wrong with it ("": nothing) by these settings."""
    return {"plugin": _plugin(chain), "entry": _entry(chain, node)}


def _plugin(chain: Chain) -> dict[str, Any]:
    try:
        fault = plugin.fault_of_plugin(chain.shim, chain.mounted_cni_bin_dir)
    except SidestepError as error:
        fault = f"can't be told: {error}"
    return {"file": str(chain.mounted_cni_bin_dir / PLUGIN), "fault": fault}


def _entry(chain: Chain, node: Node) -> dict[str, Any]:
    directory = ConfDirectory(chain, entry_of(node))
    try:
        place = directory.examine()
        files = [str(directory.path / file) for file in directory.holding()]
    except SidestepError as error:
        return {"file": None, "fault": f"can't be told: {error}", "found_in": [], "remarks": []}
    return {
        "file": str(directory.path / place.file),
        "fault": place.fault,
        "found_in": files,
        "remarks": list(place.remarks),
    }
