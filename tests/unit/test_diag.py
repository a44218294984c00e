"""Who has dialled and who has accepted, by what the kernel counts; on this machine's own loopback."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from cni.netns.proc_net import table_of_sockets
from cni.netns.sock_diag import CLOSE_WAIT, CONNECTED, ESTABLISHED, FIN_WAIT1, FIN_WAIT2, LISTEN, Diag, TcpSocket
from tests.lab.waiting import wait_until

Ends = tuple[socket.socket, socket.socket]


@pytest.fixture(params=[(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")], ids=["ip4", "ip6"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """A connection's client and server; nobody listens for it any more, as on a proxy that serves any port."""
    family, host = request.param
    with ExitStack() as stack:
        with socket.socket(family) as listener:
            listener.bind((host, 0))
            listener.listen()
            client = stack.enter_context(socket.create_connection(listener.getsockname()[:2]))
            server = stack.enter_context(listener.accept()[0])
        yield client, server


def seen(end: socket.socket) -> TcpSocket:
    """The one of this process's socket."""
    local, remote = end.getsockname()[1], end.getpeername()[1]
    with Diag() as diag:
        (found,) = (each for each in diag.sockets(*CONNECTED) if (each.local_port, each.remote_port) == (local, remote))
    return found


def assert_told(ends: Ends, *states: int) -> None:
    """States and roles of client and server."""
    found = [seen(each) for each in ends]
    assert [each.has_dialled for each in found] == [True, False], found
    assert tuple(each.state for each in found) == states


def test_a_connection_that_has_sent_nothing(ends: Ends) -> None:
    assert_told(ends, ESTABLISHED, ESTABLISHED)


def test_one_that_has_sent_both_ways(ends: Ends) -> None:
    client, server = ends
    client.sendall(b"x" * 1000)
    server.sendall(b"y" * 5000)
    wait_until(lambda: seen(server).transferred >= 6000, "the acknowledgement")
    assert_told(ends, ESTABLISHED, ESTABLISHED)


def test_one_whose_reader_is_behind(ends: Ends) -> None:
    client = ends[0]
    client.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            client.send(b"z" * 100_000)
    wait_until(lambda: seen(client) == seen(client), "the window to be full")
    assert_told(ends, ESTABLISHED, ESTABLISHED)
    client.shutdown(socket.SHUT_WR)  # it waits for its turn
    assert_told(ends, FIN_WAIT1, ESTABLISHED)


@pytest.mark.parametrize("first", [0, 1])
def test_one_that_is_half_closed(ends: Ends, first: int) -> None:
    ends[first].shutdown(socket.SHUT_WR)
    wait_until(lambda: seen(ends[first]).state == FIN_WAIT2, "the acknowledgement")
    states = (FIN_WAIT2, CLOSE_WAIT)
    assert_told(ends, *(states if first == 0 else states[::-1]))


def test_whoever_only_listens_has_done_neither() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, Diag() as diag:
        (found,) = (each for each in diag.sockets(LISTEN) if each.local_port == listener.getsockname()[1])
    assert found.has_dialled is None


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_who_takes_datagrams_from_anybody_is_bound_and_not_connected(family: int, host: str) -> None:
    with socket.socket(family, socket.SOCK_DGRAM) as taking, socket.socket(family, socket.SOCK_DGRAM) as asking:
        taking.bind((host, 0))
        asking.connect(taking.getsockname()[:2])
        with Diag() as diag:
            found = {each.local_port: each for each in diag.datagram_sockets()}
        port = taking.getsockname()[1]
        name = "udp" if family == socket.AF_INET else "udp6"
        assert [found[port]] == [each for each in table_of_sockets(name) if each.local_port == port]
        assert asking.getsockname()[1] not in found
