"""The sockets of a network namespace as proc_pid_net(5) shows them: with the addresses that the kernel really uses."""

import socket
import struct
from collections.abc import Iterable, Iterator
from ipaddress import IPv6Address
from typing import NamedTuple

from cni.policy.decision import IPAddress

LISTENING = 10  # TCP_LISTEN, uapi linux/tcp_states


class SocketRow(NamedTuple):
    """One socket; ports in host order, IPv4-mapped addresses as IPv4."""

    local: IPAddress
    local_port: int
    remote: IPAddress
    remote_port: int
    state: int
    inode: int


def rows(lines: Iterable[str]) -> Iterator[SocketRow]:
    """What net/tcp, net/tcp6, net/udp or net/udp6 has."""
    for line in lines:
        columns = line.split()
        if len(columns) > 9 and ":" in columns[1]:  # else the titles
            yield SocketRow(*_end(columns[1]), *_end(columns[2]), int(columns[3], 16), int(columns[9]))


def _end(text: str) -> tuple[IPAddress, int]:
    """Address and port: 32-bit words as the machine has them, in hexadecimal."""
    digits, _, port = text.partition(":")
    raw = b"".join(struct.pack("=I", int(digits[at : at + 8], 16)) for at in range(0, len(digits), 8))
    ip = plain(IPv6Address(raw)) if len(raw) == 16 else plain(IPv6Address(bytes(10) + b"\xff\xff" + raw))
    return ip, int(port, 16)


def plain(ip: IPAddress) -> IPAddress:
    """IPv4-mapped addresses as IPv4."""
    return getattr(ip, "ipv4_mapped", None) or ip


def endpoint(ip: object, port: int) -> str:
    """Address and port as people write them."""
    return f"[{ip}]:{port}" if ":" in str(ip) else f"{ip}:{port}"


def family_of(ip: IPAddress) -> socket.AddressFamily:
    """Of the socket that is to connect to it."""
    return socket.AF_INET if ip.version == 4 else socket.AF_INET6
