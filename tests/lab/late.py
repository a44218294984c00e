"""Transfers to a reader that begins late: who is short of memory meanwhile shows what that does to them."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

CONNECTIONS, SIZE = 40, 500_000  # transfers at once, and bytes of each
_BULK = Path(__file__).with_name("bulk.py").read_text()


def end_of_transfers(what: str, host: str, port: int) -> list[str]:
    """The command for one end: "write" or "read", to a host or, without one, as the accepting end.

    Its pipes must be text.
    """
    return [sys.executable, "-I", "-S", "-c", _BULK, what, host, str(port), str(CONNECTIONS), str(SIZE)]


def wait_for_listener(end: Any) -> None:
    """Wait until the accepting end listens."""
    assert _line(end) == "listening"


def complete_transfers(writer: Any, reader: Any) -> int:
    """Let the reader begin once the writer can't go on; returns how many transfers have come whole.

    The writer begins when the reader has read the greetings: what waits behind an unread one goes by TCP. The number is
    0 if the reader, or whoever carries the connections, was killed.
    """
    if [_line(each) for each in (writer, reader)] != ["open", "open"]:
        return 0
    _begin(writer)
    if _line(writer) != "full":
        return 0
    _begin(reader)
    return int(_line(reader) or 0)


def _begin(end: Any) -> None:
    with suppress(BrokenPipeError):
        end.stdin.write("\n")
        end.stdin.flush()


def _line(end: Any) -> str:
    return str(end.stdout.readline()).strip()
