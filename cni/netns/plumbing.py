"""Prepares a pod's namespace for capture: an address and routes of lo.

Where the proxy dials the application with its client's address, as in TPROXY and in ambient mode, there are also a
routing rule and some settings.

Each step may be repeated, because an ADD may be tried again and an address may change.
"""

import errno
from contextlib import suppress
from ipaddress import ip_network
from pathlib import Path
from typing import NamedTuple

from bpf.layout import INBOUND_SOURCE6, SPREAD4, SPREAD6, PodFlags
from cni.errors import SandboxInvalid
from cni.netns.routes import IpNetwork
from cni.netns.rtnl import LOCAL_TABLE, IpAddress, Rtnl
from cni.netns.sandbox import Sandbox

_LOOPBACK = 1  # ifindex of lo in every namespace


class Marking(NamedTuple):
    """The mark of the proxy's connections to the application, and the routing table for it.

    `mask` says which bits of the mark count, and `priority` is that of the rule; 0 stands for the kernel's default.
    """

    mark: int
    table: int
    mask: int = 0
    priority: int = 0


# Istio's own numbers. In ambient mode sockops.c sets the mark.
TPROXY = Marking(1337, 133)
AMBIENT = Marking(0x111, 100, 0xFFF, 32764)
# With these settings, the answers to a marked packet get its mark and are routed to the proxy too. tcp_fwmark_accept is
# for accepted sockets of both families. fwmark_reflect is for answers without a socket, such as a refusal.
_KEEP_MARK = [
    Path("sys/net/ipv4/tcp_fwmark_accept"),
    Path("sys/net/ipv4/fwmark_reflect"),
    Path("sys/net/ipv6/fwmark_reflect"),
]


def marking_of(flags: PodFlags) -> Marking | None:
    """What the mode of a pod with these flags needs; None if its proxy has no mark."""
    if PodFlags.AMBIENT in flags:
        return AMBIENT
    return TPROXY if PodFlags.TPROXY in flags else None


def prepare(
    rtnl: Rtnl, sandbox: Sandbox, ipv6: bool, marking: Marking | None = None, proc: Path = Path("/proc")
) -> None:
    """Make the calling thread's namespace ready for capture.

    `ipv6` says whether IPv6 is captured, `marking` how the proxy's connections to the application are marked. `proc`
    must be a procfs with writable settings; those in a container's own /proc are not. Raises SandboxInvalid.
    """
    try:
        _lead_to_lo(rtnl, 4, sandbox, marking)
        if ipv6:
            # a pod in ambient mode may have no IPv6, or have it disabled
            with suppress(*(() if sandbox.routable(6) else (OSError,))):
                if marking is AMBIENT:
                    _close_inbound_source(rtnl)
                else:
                    _add_inbound_source(rtnl)
                _lead_to_lo(rtnl, 6, sandbox, marking)
        for setting in _KEEP_MARK if marking else ():
            with suppress(FileNotFoundError):  # no IPv6 in this kernel
                (proc / setting).write_text("1")
    except OSError as error:
        raise SandboxInvalid(f"cannot prepare the pod's lo for capture: {error.strerror}") from error


def is_stale(rtnl: Rtnl, sandbox: Sandbox, ipv6: bool) -> bool:
    """Whether prepare() must run again: the pod's address has changed, or was still tentative at the last time."""
    # one address speaks for its network: a namespace may have thousands of routes
    asked: list[IpAddress] = [SPREAD4[1], *([SPREAD6[1]] if ipv6 else [])]
    for somebody in asked:
        is_local, chosen = rtnl.local_source_to(somebody)
        source = sandbox.source(somebody.version)
        if not is_local or (source and chosen != source):
            return True
    return False


def _lead_to_lo(rtnl: Rtnl, version: int, sandbox: Sandbox, marking: Marking | None) -> None:
    _spread(rtnl, SPREAD4 if version == 4 else SPREAD6, sandbox.source(version))
    if marking:
        _answer_to_proxy(rtnl, version, marking)


def _add_inbound_source(rtnl: Rtnl) -> None:
    """Add ::6 to lo. Envoy's inbound clusters and Istio's probes dial from it, or from 127.0.0.6, which lo has."""
    with suppress(FileExistsError):
        rtnl.add_address(INBOUND_SOURCE6, _LOOPBACK)


def _close_inbound_source(rtnl: Rtnl) -> None:
    """Have nothing answer to ::6, which ztunnel does not use. The programs take it for an address of every pod."""
    rtnl.make_unreachable(ip_network(INBOUND_SOURCE6), LOCAL_TABLE)


def _spread(rtnl: Rtnl, network: IpNetwork, source: IpAddress | None) -> None:
    """Make `network` local, because captured connections are spread over its addresses.

    `source` is the pod's address. Sockets that are not bound to an address get it as their source.
    """
    try:
        rtnl.make_local(network, _LOOPBACK, LOCAL_TABLE, source)
    except OSError as error:
        if error.errno != errno.EINVAL or source is None:
            raise
        # The address is still tentative: leave it out. connect.c binds it where that matters; follow.py sets it later.
        rtnl.make_local(network, _LOOPBACK, LOCAL_TABLE, None)


def _answer_to_proxy(rtnl: Rtnl, version: int, marking: Marking) -> None:
    """Keep the application's answers in the pod: the proxy dials the application from the client's address."""
    everything = ip_network("0.0.0.0/0" if version == 4 else "::/0")
    with suppress(FileExistsError):
        rtnl.route_mark(version, marking.mark, marking.table, marking.mask, marking.priority)
    rtnl.make_local(everything, _LOOPBACK, marking.table, None)
