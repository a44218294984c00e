"""Prepares a pod's namespace for capture: an address and routes of lo, and in TPROXY mode a rule and some settings.

Each step may be repeated, because an ADD may be tried again and an address may change.
"""

import errno
from contextlib import suppress
from ipaddress import ip_network
from pathlib import Path

from bpf.layout import INBOUND_SOURCE6, SPREAD4, SPREAD6
from cni.errors import SandboxInvalid
from cni.netns.routes import IpNetwork
from cni.netns.rtnl import LOCAL_TABLE, IpAddress, Rtnl
from cni.netns.sandbox import Sandbox

_LOOPBACK = 1  # ifindex of lo in every namespace
# Istio's own numbers for TPROXY: the mark of the proxy's connections to the application, and the routing table for it
_MARK, _TABLE = 1337, 133
# With these settings, the answers to a marked packet get its mark and are routed to the proxy too. tcp_fwmark_accept is
# for accepted sockets of both families. fwmark_reflect is for answers without a socket, such as a refusal.
_KEEP_MARK = [
    Path("sys/net/ipv4/tcp_fwmark_accept"),
    Path("sys/net/ipv4/fwmark_reflect"),
    Path("sys/net/ipv6/fwmark_reflect"),
]


def prepare(rtnl: Rtnl, sandbox: Sandbox, ipv6: bool, tproxy: bool, proc: Path = Path("/proc")) -> None:
    """Make the calling thread's namespace ready for capture.

    `ipv6` says whether IPv6 is captured, `tproxy` whether the mode is TPROXY. `proc` must be a procfs with writable
    settings; those in a container's own /proc are not. Raises SandboxInvalid.
    """
    try:
        if ipv6:
            _add_inbound_source(rtnl)
        for version in (4, 6) if ipv6 else (4,):
            _spread(rtnl, SPREAD4 if version == 4 else SPREAD6, sandbox.source(version))
            if tproxy:
                _answer_to_proxy(rtnl, version)
        for setting in _KEEP_MARK if tproxy else ():
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


def _add_inbound_source(rtnl: Rtnl) -> None:
    """Add ::6 to lo. Envoy's inbound clusters and Istio's probes dial from it, or from 127.0.0.6, which lo has."""
    with suppress(FileExistsError):
        rtnl.add_address(INBOUND_SOURCE6, _LOOPBACK)


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


def _answer_to_proxy(rtnl: Rtnl, version: int) -> None:
    """Keep the application's answers in the pod: the proxy dials the application from the client's address."""
    everything = ip_network("0.0.0.0/0" if version == 4 else "::/0")
    with suppress(FileExistsError):
        rtnl.route_mark(version, _MARK, _TABLE)
    rtnl.make_local(everything, _LOOPBACK, _TABLE, None)
