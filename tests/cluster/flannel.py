"""flannel on a node, in the place of routes by hand: flanneld, and its CNI plugin before the bridge.

Both are what flannel's own manifest runs in pods (Documentation/kube-flannel.yml of its module), with the usual
backend, vxlan. Ranges are the controller manager's, a range of each family for each Node.
"""

import json
from pathlib import Path

from tests.cluster.addresses import POD_NETWORKS
from tests.cluster.builder import BIN
from tests.cluster.host import Host

DAEMON, PLUGIN = "flanneld", "flannel"
# Until its Node is there and has ranges, flanneld ends; kubelet would start it again.
_AGAIN = 'until "$@"; do sleep 1; done'


def conflist() -> dict[str, object]:
    """The chain. The plugin knows no later version of CNI's."""
    delegate = {"hairpinMode": True, "isDefaultGateway": True}
    plugins = [
        {"type": PLUGIN, "delegate": delegate},
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ]
    return {"name": "cbr0", "cniVersion": "0.4.0", "plugins": plugins}


def start(host: Host, kubeconfig: Path) -> None:
    """flanneld, which makes the devices and routes to other nodes when it knows of them."""
    network = host.directory / "net-conf.json"
    families = {"Network": str(POD_NETWORKS[0]), "EnableIPv6": True, "IPv6Network": str(POD_NETWORKS[1])}
    network.write_text(json.dumps({**families, "Backend": {"Type": "vxlan"}}))
    options = {"kubeconfig-file": kubeconfig, "net-config-path": network, "iface": "eth0"}
    flanneld: list[str | Path] = [BIN / DAEMON, "--ip-masq", "--kube-subnet-mgr"]
    flanneld += [f"--{name}={value}" for name, value in options.items()]
    host.start(DAEMON, ["sh", "-c", _AGAIN, "sh", "env", f"NODE_NAME={host.name}", *flanneld])
