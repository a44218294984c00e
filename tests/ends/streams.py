"""One application of a transfer: writes on connections or reads them without a pause, and says how each ended.

Runs as `python3 -I -S -c … write HOST PORT COUNT FD` or `… read PORT COUNT`. Byte N of a stream is N modulo 251, after
one byte with the connection's number. FD is a file of numbers of eight bytes: how many bytes the kernel has taken from
each connection, and then how many it may take at most. The reader prints a line when the transfer may begin, and when
FLOWING bytes of each connection have come; both print [end, bytes] of each connection in the end.
"""

import json
import mmap
import selectors
import socket
import struct
import sys
import time

PERIOD = 251
CHUNK = 1 << 18
PATTERN = bytes(range(PERIOD)) * (CHUNK // PERIOD + 2)
FLOWING = 1 << 18
PAUSE_SECONDS = 0.0005  # of a writer that may not go on
IDLE_SECONDS = 5.0  # if no connection brings anything for so long, those that have not ended hang: "nothing"

Found = list[tuple[str, int]]


def write(host: str, port: int, count: int, taken: int) -> Found:
    """Write until each connection has ended."""
    sums, found = mmap.mmap(taken, 8 * (count + 1)), [("nothing", 0)] * count
    selector, connections = selectors.DefaultSelector(), list[socket.socket]()
    for number in range(count):
        connection = socket.create_connection((host, port), 10)
        connection.sendall(bytes([number]))
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ | selectors.EVENT_WRITE, number)
        connections.append(connection)
    while selector.get_map() and (ready := selector.select(IDLE_SECONDS)):
        is_idle = True
        for key, events in ready:
            (at,), (limit,) = (struct.unpack_from("Q", sums, 8 * each) for each in (key.data, count))
            size, end = _written(connections[key.data], at, min(CHUNK, limit - at), events)
            struct.pack_into("Q", sums, 8 * key.data, at + size)
            is_idle = is_idle and not size
            if end:
                found[key.data] = (end, at + size)
                selector.unregister(key.fileobj)
        if is_idle:
            time.sleep(PAUSE_SECONDS)
    return found


def _written(connection: socket.socket, at: int, size: int, events: int) -> tuple[int, str]:
    """Bytes that the kernel has taken of `size`, and how the connection has ended, if it has.

    What there is to read comes first, as with a program that looks for an answer before it goes on.
    """
    try:
        if events & selectors.EVENT_READ:
            return 0, "data" if connection.recv(1) else "end"
        return (connection.send(PATTERN[at % PERIOD :][:size]) if size else 0), ""
    except BlockingIOError:
        return 0, ""
    except ConnectionResetError:
        return 0, "reset"
    except BrokenPipeError:
        return 0, "broken pipe"


def read(port: int, count: int) -> Found:
    """Read until each connection has ended."""
    found, selector, is_told = [("nothing", 0)] * count, selectors.DefaultSelector(), False
    connections = dict[int, socket.socket]()
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=count)
    print("ready", flush=True)
    for _ in range(count):
        connection, _ = listener.accept()
        number = connection.recv(1)[0]
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, number)
        connections[number] = connection
    while selector.get_map() and (ready := selector.select(IDLE_SECONDS)):
        for key, _ in ready:
            _, at = found[key.data]
            size, end = _read(connections[key.data], at)
            found[key.data] = (end or "nothing", at + size)
            if end:
                selector.unregister(key.fileobj)
        if not is_told and min(size for _, size in found) >= FLOWING:
            is_told = True
            print("flowing", flush=True)
    return found


def _read(connection: socket.socket, at: int) -> tuple[int, str]:
    """Bytes that have come, and how the connection has ended, if it has."""
    try:
        data = connection.recv(CHUNK)
    except BlockingIOError:
        return 0, ""
    except ConnectionResetError:
        return 0, "reset"
    if data != PATTERN[at % PERIOD :][: len(data)]:
        return len(data), "wrong bytes"
    return len(data), "" if data else "end"


if __name__ == "__main__":
    _, what, *arguments = sys.argv
    ends = write(arguments[0], *map(int, arguments[1:])) if what == "write" else read(*map(int, arguments))
    print(json.dumps(ends), flush=True)
