"""A plain client that asks an HTTP server again and again; runs inside a pod as `python3 -I -S -c`.

Arguments: seconds between two requests, then URLs without scheme as HOST PORT HOST PORT … Prints a JSON line for each
request: when it began and ended (time.monotonic(), the same for all processes), whom it asked, and who answered.
"""

import json
import socket
import sys
import time

PAUSE, TARGETS = float(sys.argv[1]), list(zip(sys.argv[2::2], sys.argv[3::2], strict=True))
LONGEST = 3.0  # seconds of one request
REQUEST = b"GET / HTTP/1.1\r\nHost: app\r\nConnection: close\r\n\r\n"


def ask(host: str, port: str) -> dict[str, object]:
    """What the server saw of this connection, and this end's port; `error` if there was no whole answer."""
    try:
        with socket.create_connection((host, int(port)), LONGEST) as connection:
            connection.sendall(REQUEST)
            own = connection.getsockname()[1]
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        return {"seen": json.loads(answer.partition(b"\r\n\r\n")[2]), "own_port": own}
    except (OSError, ValueError) as error:
        return {"error": str(error) or type(error).__name__}


while True:
    for host, port in TARGETS:
        began = time.monotonic()
        told = {"host": host, **ask(host, port)}
        print(json.dumps(told | {"began": began, "ended": time.monotonic()}), flush=True)
        time.sleep(PAUSE)
