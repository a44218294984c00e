"""Which part of sidestep needs what of the kernel, since which Linux, and what to do where it is missing.

docs/kernels.md shows the same. The versions are advice for whoever chooses a kernel: verdicts never come from them.
"""

from dataclasses import dataclass

_ACCEPTED = "accepting redirected connections"
_DNS = "DNS capture"


@dataclass(frozen=True)
class Need:
    """A feature's reason."""

    label: str  # as an operator may know it
    needed_by: str
    since: str  # the first Linux that has all that our program of this name uses


# by the names of bpf/probing/features.py
NEEDS = {
    "hash": Need("map: hash", "pods, ports, addresses", "4.6"),
    "lru_hash": Need("map: lru_hash", "original destinations", "4.10"),
    "lpm_trie": Need("map: lpm_trie", "address ranges", "4.11"),
    "array": Need("map: array", "upgrades", "3.19"),
    "sockhash": Need("map: sockhash", "inbound capture", "5.7"),
    "sk_storage": Need("map: sk_storage", "outbound capture", "5.2"),
    "sock_create": Need("sock_create", "telling proxy and application apart", "5.9"),
    "connect4": Need("connect4", "outbound capture, IPv4", "5.7"),
    "connect6": Need("connect6", "outbound capture, IPv6 and mapped IPv4", "5.7"),
    "post_bind4": Need("post_bind4", "inbound capture: the proxy's listeners", "5.9"),
    "post_bind6": Need("post_bind6", "inbound capture: the proxy's listeners", "5.9"),
    "sendmsg4": Need("sendmsg4", _DNS, "5.7"),
    "sendmsg6": Need("sendmsg6", _DNS, "5.7"),
    "recvmsg4": Need("recvmsg4", _DNS, "5.3"),
    "recvmsg6": Need("recvmsg6", _DNS, "5.3"),
    "getpeername4": Need("getpeername4", "applications that ask for their peer", "5.8"),
    "getpeername6": Need("getpeername6", "applications that ask for their peer", "5.8"),
    "sockops": Need("sockops", f"{_ACCEPTED}; inbound capture", "5.15"),
    "getsockopt": Need("getsockopt", "SO_ORIGINAL_DST for the proxy", "5.15"),
    "sk_lookup": Need("sk_lookup", "inbound capture", "5.17"),
    "bpf_link": Need("bpf_link", "attaching and upgrading in place", "5.7"),
    "SO_NETNS_COOKIE": Need("SO_NETNS_COOKIE", "naming pods", "5.14"),
    "pidfd_getfd": Need("pidfd_getfd", "pods that were there before", "5.6"),
    "locked memory": Need("memory for maps", "tables of full size", "5.11"),
}
MINIMUM = "5.17"  # the largest of them
