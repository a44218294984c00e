"""Ends connections of a pod that its denied ports would not let begin any more."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from bpf.layout import OUTBOUND_PORT, SPREAD4, SPREAD6
from cni.copies import copy_of, sockets_of
from cni.diag import Connection, Diag
from cni.processes import Crowd
from cni.sandbox import visit

Address = IPv4Address | IPv6Address


@dataclass(frozen=True)
class Denied:
    """What a pod denies, and which addresses are its own, to which none of it applies."""

    outbound: frozenset[int]
    inbound: frozenset[int]
    own: frozenset[Address]

    def covers(self, connection: Connection, remote: Address, remote_port: int) -> bool:
        """Whether a connection with this (original) destination would be refused now."""
        if remote.is_loopback or remote in self.own:
            return False
        return remote_port in self.outbound or connection.local_port in self.inbound


def close_denied(netns: int, crowd: Crowd, denied: Denied, proc: Path) -> list[str]:
    """Reset every such connection of a namespace; returns the destinations. Raises OSError."""
    with_original = visit(netns, lambda _: list(_connections()))
    captured = {each.inode: each for each in with_original if _is_captured(each)}
    originals = dict(_originals(captured, crowd, proc))
    wanted = []
    for each in with_original:
        remote, port = originals.get(each.inode, (each.remote, each.remote_port))
        if denied.covers(each, remote, port):
            wanted.append((each, f"{remote}:{port}" if remote.version == 4 else f"[{remote}]:{port}"))
    return visit(netns, lambda _: list(_destroy(wanted)))


def _connections() -> Iterator[Connection]:
    with Diag() as diag:
        yield from diag.connections()


def _destroy(wanted: list[tuple[Connection, str]]) -> Iterator[str]:
    with Diag() as diag:
        for connection, destination in wanted:
            if diag.destroy(connection):
                yield destination


def _is_captured(connection: Connection) -> bool:
    return connection.remote_port == OUTBOUND_PORT and (
        connection.remote.is_loopback or connection.remote in SPREAD4 or connection.remote in SPREAD6
    )


def _originals(captured: dict[int, Connection], crowd: Crowd, proc: Path) -> Iterator[tuple[int, tuple[Address, int]]]:
    """Inode → where a captured connection was to go: what getpeername() of its own socket says."""
    for pid in crowd.pids if captured else ():
        for number, inode in sockets_of(proc, pid):
            if inode in captured:
                with suppress(OSError), copy_of(pid, number, inode) as copy:
                    host, port = copy.getpeername()[:2]
                    address = ip_address(host)
                    yield inode, (getattr(address, "ipv4_mapped", None) or address, port)
