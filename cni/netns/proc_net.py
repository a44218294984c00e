"""Lists the sockets of a network namespace from proc_pid_net(5), with the addresses that the kernel really uses."""

import socket
import struct
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import NamedTuple

from cni.policy.decision import IPAddress


class SocketRow(NamedTuple):
    """One socket. Ports are in host order; IPv4-mapped addresses are given as IPv4."""

    family: socket.AddressFamily
    local_ip: IPAddress
    local_port: int
    remote_ip: IPAddress
    remote_port: int
    state: int
    inode: int
    uid: int = 0  # in the user namespace of the reader


def table_of_sockets(name: str) -> Iterator[SocketRow]:
    """The rows of one file (tcp, tcp6, udp, udp6) in the calling thread's namespace; none in a kernel without IPv6."""
    path = Path("/proc/thread-self/net") / name
    if path.exists():
        with path.open() as lines:
            yield from rows(lines)


def rows(lines: Iterable[str]) -> Iterator[SocketRow]:
    """Parse the lines of net/tcp, net/tcp6, net/udp or net/udp6."""
    for line in lines:
        columns = line.split()
        if len(columns) > 9 and ":" in columns[1]:  # else it is the line of titles
            family = socket.AF_INET if len(columns[1].partition(":")[0]) == 8 else socket.AF_INET6
            ends = (*_end(columns[1]), *_end(columns[2]))
            yield SocketRow(family, *ends, int(columns[3], 16), int(columns[9]), int(columns[7]))


def _end(text: str) -> tuple[IPAddress, int]:
    """Parse an address and a port, both in hexadecimal. The address is 32-bit words in the machine's byte order."""
    digits, _, port = text.partition(":")
    raw = b"".join(struct.pack("=I", int(digits[at : at + 8], 16)) for at in range(0, len(digits), 8))
    return IPv4Address(raw) if len(raw) == 4 else plain(IPv6Address(raw)), int(port, 16)


def plain(ip: IPAddress) -> IPAddress:
    """An IPv4-mapped address as IPv4; any other address unchanged."""
    return getattr(ip, "ipv4_mapped", None) or ip


def endpoint(ip: object, port: int) -> str:
    """Address and port as people write them."""
    return f"[{ip}]:{port}" if ":" in str(ip) else f"{ip}:{port}"


def family_of(ip: IPAddress) -> socket.AddressFamily:
    """The family of a socket that can connect to this address."""
    return socket.AF_INET if ip.version == 4 else socket.AF_INET6
