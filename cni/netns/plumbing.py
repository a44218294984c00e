"""The few things that capture needs inside a pod's namespace besides map entries: addresses and routes of lo.

Everything may be repeated: an ADD that is tried again, or an address that has changed, finds what is there already.
"""

import errno
from contextlib import suppress
from ipaddress import ip_network
from pathlib import Path

from bpf.layout import SPREAD4, SPREAD6
from cni.errors import SandboxInvalid
from cni.netns.rtnl import LOCAL_TABLE, IpAddress, IpNetwork, Rtnl
from cni.netns.sandbox import INBOUND_SOURCE6, Sandbox

_LOOPBACK = 1  # ifindex of lo in every namespace
# Istio's own numbers for TPROXY: the mark of the proxy's connections to the application, and the table for it
_MARK, _TABLE = 1337, 133
# Answers to a marked packet have its mark, and so are routed to the proxy as well: those of the socket that accepts a
# SYN (for both families), and a refusal, for which there is no socket.
_KEEP_MARK = [
    Path("sys/net/ipv4/tcp_fwmark_accept"),
    Path("sys/net/ipv4/fwmark_reflect"),
    Path("sys/net/ipv6/fwmark_reflect"),
]


def prepare(rtnl: Rtnl, sandbox: Sandbox, ipv6: bool, tproxy: bool, proc: Path = Path("/proc")) -> None:
    """Make the calling thread's namespace ready for capture.

    `ipv6` is whether that is captured, `tproxy` whether the mode is TPROXY. `proc` is a procfs whose settings may be
    written, which a container's own may not. Raises SandboxInvalid.
    """
    try:
        if ipv6:
            _add_inbound_source(rtnl)
        for version in (4, 6) if ipv6 else (4,):
            _spread(rtnl, SPREAD4 if version == 4 else SPREAD6, sandbox.routable(version))
            if tproxy:
                _answer_to_proxy(rtnl, version)
        for setting in _KEEP_MARK if tproxy else ():
            with suppress(FileNotFoundError):  # no IPv6 in this kernel
                (proc / setting).write_text("1")
    except OSError as error:
        raise SandboxInvalid(f"cannot prepare the pod's lo for capture: {error.strerror}") from error


def is_stale(rtnl: Rtnl, sandbox: Sandbox, ipv6: bool) -> bool:
    """Whether the pod's address has changed, or had not settled, since prepare()."""
    sources = rtnl.local_sources(LOCAL_TABLE)
    wanted = [(SPREAD4, sandbox.routable(4))] + ([(SPREAD6, sandbox.routable(6))] if ipv6 else [])
    return any(network not in sources or sources[network] != source for network, source in wanted)


def _add_inbound_source(rtnl: Rtnl) -> None:
    """::6 is where Envoy's inbound clusters and Istio's probes dial from; 127.0.0.6 needs no address."""
    with suppress(FileExistsError):
        rtnl.add_address(INBOUND_SOURCE6, _LOOPBACK)


def _spread(rtnl: Rtnl, network: IpNetwork, source: IpAddress | None) -> None:
    """Captured connections go to many addresses of lo; a socket that is not bound gets the pod's address as source."""
    try:
        rtnl.make_local(network, _LOOPBACK, LOCAL_TABLE, source)
    except OSError as error:
        if error.errno != errno.EINVAL or source is None:
            raise
        # the address is still tentative: connect.c binds it where that matters, and it is set once it has settled
        rtnl.make_local(network, _LOOPBACK, LOCAL_TABLE, None)


def _answer_to_proxy(rtnl: Rtnl, version: int) -> None:
    """What the application sends to a client whose address the proxy has borrowed stays in the pod."""
    everything = ip_network("0.0.0.0/0" if version == 4 else "::/0")
    with suppress(FileExistsError):
        rtnl.route_mark(version, _MARK, _TABLE)
    rtnl.make_local(everything, _LOOPBACK, _TABLE, None)
