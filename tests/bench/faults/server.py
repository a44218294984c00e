"""A server outside of the mesh that ends its half first, or answers late (`python3 -I -S`).

server.py PORT SECONDS   The first byte that a client sends says what it gets:
                         c, s  an end at once; the client's later bytes, and its end, are counted
                         h     a thousand bytes, SECONDS after the client has ended its half
                         n     a word, and the end
A line on stdin is answered with the counts as JSON, and they begin anew.
"""

import contextlib
import json
import socket
import sys
import threading
import time

ANSWER = b"x" * 1000


class Counts:
    """What arrived."""

    def __init__(self) -> None:
        self.ends = 0  # of clients that only close
        self.bytes = 0  # of clients that say more

    def serve(self, connection: socket.socket, seconds: float) -> None:
        with connection, contextlib.suppress(OSError):
            kind = connection.recv(1)
            if kind == b"n":
                connection.sendall(b"hello")
            elif kind == b"h":
                connection.recv(1)
                time.sleep(seconds)
                connection.sendall(ANSWER)
            else:
                connection.shutdown(socket.SHUT_WR)
                while data := connection.recv(65536):
                    self.bytes += len(data)
                self.ends += kind == b"c"


def accept(listener: socket.socket, counts: Counts, seconds: float) -> None:
    while True:
        threading.Thread(target=counts.serve, args=(listener.accept()[0], seconds), daemon=True).start()


if __name__ == "__main__":
    counts = Counts()
    listener = socket.create_server(("0.0.0.0", int(sys.argv[1])), backlog=1024)
    threading.Thread(target=accept, args=(listener, counts, float(sys.argv[2])), daemon=True).start()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps({"ends": counts.ends, "bytes": counts.bytes}), flush=True)
        counts.ends = counts.bytes = 0
