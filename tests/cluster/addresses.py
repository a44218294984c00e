"""Which addresses a cluster has. The same in every cluster: nobody outside of its namespaces sees them."""

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network

Network = IPv4Network | IPv6Network

# IPv4 addresses of labs are in 10.128.0.0/9 (tests/lab/node.py), so a line of a log says whose it is
HOSTS: tuple[Network, Network] = (IPv4Network("10.64.0.0/24"), IPv6Network("fd64::/64"))
POD_NETWORKS: tuple[Network, Network] = (IPv4Network("10.66.0.0/16"), IPv6Network("fd66::/56"))
SERVICES: tuple[Network, Network] = (IPv4Network("10.65.0.0/16"), IPv6Network("fd65::/112"))


@dataclass(frozen=True)
class Place:
    """One host's addresses, and the ranges of the pods on it. `number` 0 is the control plane, which has no pods."""

    number: int

    @property
    def ips(self) -> tuple[str, str]:
        """IPv4 and IPv6."""
        return str(HOSTS[0][self.number + 1]), str(HOSTS[1][self.number + 1])

    @property
    def addresses(self) -> list[str]:
        """As `ip address add` takes them."""
        return [f"{ip}/{hosts.prefixlen}" for ip, hosts in zip(self.ips, HOSTS, strict=True)]

    @property
    def pod_ranges(self) -> tuple[str, str]:
        """IPv4 and IPv6, where nodes do not get them from the controller manager."""
        return str(POD_NETWORKS[0][256 * self.number]) + "/24", str(POD_NETWORKS[1][self.number << 64]) + "/64"


CONTROL = Place(0)
API_URL = f"https://{CONTROL.ips[0]}:6443"
# what the API server takes for itself: the first of the range (Service "kubernetes")
API_SERVICE = str(SERVICES[0][1])
