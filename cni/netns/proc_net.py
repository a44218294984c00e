"""The sockets of a network namespace as proc_pid_net(5) shows them: with the addresses that the kernel really uses."""

import socket
import struct
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import NamedTuple

from cni.policy.decision import IPAddress


class SocketRow(NamedTuple):
    """One socket; ports in host order, IPv4-mapped addresses as IPv4."""

    family: socket.AddressFamily
    local_ip: IPAddress
    local_port: int
    remote_ip: IPAddress
    remote_port: int
    state: int
    inode: int


def table(name: str) -> Iterator[SocketRow]:
    """The rows of one file (tcp, tcp6, udp, udp6) in the calling thread's namespace; none in a kernel without IPv6."""
    path = Path("/proc/thread-self/net") / name
    if path.exists():
        with path.open() as lines:
            yield from rows(lines)


def rows(lines: Iterable[str]) -> Iterator[SocketRow]:
    """What net/tcp, net/tcp6, net/udp or net/udp6 has."""
    for line in lines:
        columns = line.split()
        if len(columns) > 9 and ":" in columns[1]:  # else the titles
            family = socket.AF_INET if len(columns[1].partition(":")[0]) == 8 else socket.AF_INET6
            yield SocketRow(family, *_end(columns[1]), *_end(columns[2]), int(columns[3], 16), int(columns[9]))


def _end(text: str) -> tuple[IPAddress, int]:
    """Address and port: 32-bit words as the machine has them, in hexadecimal."""
    digits, _, port = text.partition(":")
    raw = b"".join(struct.pack("=I", int(digits[at : at + 8], 16)) for at in range(0, len(digits), 8))
    return IPv4Address(raw) if len(raw) == 4 else plain(IPv6Address(raw)), int(port, 16)


def plain(ip: IPAddress) -> IPAddress:
    """IPv4-mapped addresses as IPv4."""
    return getattr(ip, "ipv4_mapped", None) or ip


def endpoint(ip: object, port: int) -> str:
    """Address and port as people write them."""
    return f"[{ip}]:{port}" if ":" in str(ip) else f"{ip}:{port}"


def family_of(ip: IPAddress) -> socket.AddressFamily:
    """Of the socket that is to connect to it."""
    return socket.AF_INET if ip.version == 4 else socket.AF_INET6
