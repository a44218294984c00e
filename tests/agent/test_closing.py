"""Which connections a pod's denied ports end: by the port of whoever serves, and in that direction alone."""

import errno
import os
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from bpf.layout import Address
from cni.netns.processes import Crowd
from cni.netns.sock_diag import ESTABLISHED, LISTEN, TcpSocket
from installer.commands.deny import closing
from installer.commands.deny.closing import Closed, Denied, close_denied

POD, PEER = IPv4Address("10.0.0.1"), IPv4Address("10.0.0.2")


def tcp(local_port: int, remote_port: int, has_dialled: bool | None, remote: IPv4Address = PEER) -> TcpSocket:
    ends = bytes(Address.of(POD).bytes), local_port, bytes(Address.of(remote).bytes), remote_port
    return TcpSocket(ESTABLISHED, *ends, has_dialled=has_dialled)


class FakeDiag:
    """A namespace's sockets; `refusal` is the errno with which they are not ended."""

    every: tuple[TcpSocket, ...] = ()
    refusal = 0

    def __enter__(self) -> "FakeDiag":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def sockets(self, *_: int) -> Iterator[TcpSocket]:
        return iter(self.every)

    def destroy(self, doomed: TcpSocket) -> bool:
        if self.refusal:
            raise OSError(self.refusal, os.strerror(self.refusal))
        return True


@pytest.fixture
def diag(monkeypatch: pytest.MonkeyPatch) -> type[FakeDiag]:
    fake = type("Fake", (FakeDiag,), {})
    monkeypatch.setattr(closing, "Diag", fake)
    return fake


def closed(denied: Denied) -> Closed:
    netns = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        return close_denied(netns, Crowd(0), denied, Path("/proc"))
    finally:
        os.close(netns)


def denying(outbound: int = 0, inbound: int = 0) -> Denied:
    return Denied(frozenset((outbound,)), frozenset((inbound,)), frozenset((POD,)))


@pytest.mark.parametrize(
    ("connection", "denied", "ends"),
    [
        (tcp(5000, 5432, has_dialled=True), denying(outbound=5432), True),
        (tcp(8080, 5432, has_dialled=False), denying(outbound=5432), False),  # it is the client's port
        (tcp(40000, 39000, has_dialled=False), denying(inbound=40000), True),  # captured: nobody listens on it
        (tcp(40000, 39000, has_dialled=True), denying(inbound=40000), False),  # an ephemeral port
        (tcp(40000, 443, has_dialled=True), denying(inbound=40000), False),
        (tcp(8080, 8080, has_dialled=True), denying(inbound=8080), False),
        (tcp(8080, 8080, has_dialled=False), denying(outbound=8080), False),
        (tcp(5000, 5432, has_dialled=True, remote=POD), denying(outbound=5432), False),
        (tcp(5000, 5432, has_dialled=True, remote=IPv4Address("127.0.0.1")), denying(outbound=5432), False),
    ],
)
def test_only_the_servers_port_counts(diag: type[FakeDiag], connection: TcpSocket, denied: Denied, ends: bool) -> None:
    diag.every = (connection,)
    assert bool(closed(denied).destinations) == ends


@pytest.mark.parametrize(("listens", "ends"), [(True, True), (False, False)])
def test_whoever_listens_serves_where_the_kernel_does_not_tell(diag: type[FakeDiag], listens: bool, ends: bool) -> None:
    listener = TcpSocket(LISTEN, bytes(16), 40000 if listens else 1, bytes(16), 0)
    diag.every = (tcp(40000, 443, has_dialled=None), listener)
    assert bool(closed(denying(inbound=40000)).destinations) == ends


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EOPNOTSUPP, "CONFIG_INET_DIAG_DESTROY"),
        (errno.EPERM, "run as root with CAP_SYS_ADMIN and CAP_NET_ADMIN"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_what_the_kernel_refuses_is_told_and_not_raised(diag: type[FakeDiag], number: int, words: str) -> None:
    diag.every, diag.refusal = (tcp(5000, 5432, has_dialled=True),), number
    outcome = closed(denying(outbound=5432))
    assert outcome.destinations == ()
    assert words in outcome.problem
    assert "CNI_NETNS" not in outcome.problem


def test_a_namespace_that_cannot_be_entered_is_told_too(diag: type[FakeDiag]) -> None:
    descriptor = os.open("/dev/null", os.O_RDONLY)
    try:
        outcome = close_denied(descriptor, Crowd(0), denying(outbound=1), Path("/proc"))
    finally:
        os.close(descriptor)
    assert outcome == Closed(problem="Invalid argument")
