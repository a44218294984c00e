"""What a cluster's nodes are like: their cgroups, how kubelet and containerd divide them, and the pods' network.

The variables CGROUPS, DRIVER and NETWORK choose. By default nodes have the machine's hybrid layout, the driver cgroupfs
and bridges with routes between them.
"""

from tests.cluster.variables import chosen

HYBRID, PURE = "hybrid", "pure"
CGROUPFS, SYSTEMD = "cgroupfs", "systemd"
BRIDGE, FLANNEL, CILIUM = "bridge", "flannel", "cilium"
# the CNI chain of each, before sidestep's plugin
PLUGINS = {BRIDGE: ["bridge", "portmap"], FLANNEL: ["flannel", "portmap"], CILIUM: ["cilium-cni"]}


def cgroups() -> str:
    """HYBRID, the v1 controllers beside cgroup2, or PURE, cgroup2 alone. Raises UnknownValue.

    A node with a systemd has PURE: of the machine's hierarchies a systemd would want its own.
    """
    return chosen("CGROUPS", (PURE,), PURE) if driver() == SYSTEMD else chosen("CGROUPS", (HYBRID, PURE), HYBRID)


def driver() -> str:
    """Who makes cgroups: kubelet and runc themselves, CGROUPFS, or the node's SYSTEMD. Raises UnknownValue."""
    return chosen("DRIVER", (CGROUPFS, SYSTEMD), CGROUPFS)


def network() -> str:
    """Who connects pods: BRIDGE with routes by hand, or the daemons of FLANNEL or CILIUM. Raises UnknownValue."""
    return chosen("NETWORK", PLUGINS, BRIDGE)


def cgroup_of(uid: str, qos: str, container: str) -> str:
    """Where in cgroup2 kubelet and containerd keep a container: its Pod's UID, its Pod's QoS class, and its own id."""
    tiers = ["kubepods"] + ([] if qos == "Guaranteed" else [qos.lower()])
    if driver() == CGROUPFS:
        return "/".join(("", *tiers, f"pod{uid}", container))
    # a slice has the names of those that it is in before its own, and a dash in a name would be one more level
    names = [*tiers, f"pod{uid.replace('-', '_')}"]
    slices = ["-".join(names[: end + 1]) + ".slice" for end in range(len(names))]
    return "/".join(("", *slices, f"cri-containerd-{container}.scope"))
