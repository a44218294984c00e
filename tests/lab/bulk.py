"""One end of some connections over which much goes one way, to a reader that begins late.

Runs as `python3 -I -S -c … write|read HOST PORT COUNT SIZE`; without a HOST ("") it listens. Prints "open" when all
connections are there and GREETING has gone each way. A line of input has it begin. The writer prints "full"
when it has written all or nothing more is taken. In the end either prints how many connections have had SIZE bytes.
"""

import selectors
import socket
import sys

FULL_SECONDS = 2.0  # without a byte taken: whoever comes next is full
LAST_SECONDS = 20.0  # without a byte on any connection: no more will come
ROOM = bytearray(1 << 16)
GREETING = bytes(16)  # enough for an inspector to see that it is neither TLS nor HTTP

Left = dict[socket.socket, int]


def connections(host: str, port: int, count: int) -> list[socket.socket]:
    """Make or accept them; each has carried GREETING both ways."""
    if host:
        made = [socket.create_connection((host, port), 30) for _ in range(count)]
    else:
        listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=count)
        print("listening", flush=True)
        made = [listener.accept()[0] for _ in range(count)]
    for is_sending in (True, False) if host else (False, True):
        for each in made:  # which the proxies may have brought in another order
            if is_sending:
                each.sendall(GREETING)
            else:
                each.recv(len(GREETING), socket.MSG_WAITALL)
    for each in made:
        each.setblocking(False)
    return made


def go_on(left: Left, event: int, seconds: float) -> None:
    """Until each has had its bytes or has ended, or nothing happens for so long."""
    with selectors.DefaultSelector() as selector:
        for connection, size in left.items():
            if size:
                selector.register(connection, event, connection)
        while selector.get_map() and (ready := selector.select(seconds)):
            for key, _ in ready:
                if _moved(left, key.data, event) is None or not left[key.data]:
                    selector.unregister(key.data)


def _moved(left: Left, connection: socket.socket, event: int) -> int | None:
    """Bytes that have gone; None if the connection has ended."""
    try:
        if event == selectors.EVENT_READ:
            size = connection.recv_into(ROOM)
        else:
            size = connection.send(ROOM[: min(left[connection], 16384)])
    except BlockingIOError:
        return 0
    except OSError:
        return None
    left[connection] -= size
    return size or None


if __name__ == "__main__":
    what, host, *numbers = sys.argv[1:]
    port, count, size = map(int, numbers)
    left = dict.fromkeys(connections(host, port, count), size)
    print("open", flush=True)
    sys.stdin.readline()
    if what == "write":
        go_on(left, selectors.EVENT_WRITE, FULL_SECONDS)
        print("full", flush=True)
        go_on(left, selectors.EVENT_WRITE, LAST_SECONDS)
    else:
        go_on(left, selectors.EVENT_READ, LAST_SECONDS)
    print(sum(not each for each in left.values()), flush=True)
