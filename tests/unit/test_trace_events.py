"""Events of the programs as documents, as JSON and as lines, and the filters for them."""

import ctypes
import json
from ipaddress import ip_address

import pytest

from bpf.layout import RULES, TOTALS, Address, Event, EventKind
from installer.inspect.trace.events import BadFilter, Reader, Told, Wanted, line_of, told

READER = Reader(lambda cookie: f'default/pod-{cookie}"')


def event(kind: EventKind = EventKind.CONNECT, **fields: object) -> Told:
    made = Event(time=5_000_000_123, cookie=7, kind=kind, verdict=1, rule=RULES.index("O10"), protocol=6)
    made.pid, made.uid, made.command = 42, 1000, b'cu"rl'
    made.source, made.source_port = Address.of(ip_address("10.0.0.1")), 40000
    made.destination, made.destination_port = Address.of(ip_address("fd00::9")), 443
    for name, value in fields.items():
        setattr(made, name, value)
    return told(bytes(made))


def test_every_field_is_where_the_programs_put_it() -> None:
    found = event(signal=9, sender=3)
    assert ctypes.sizeof(Event) == 104
    assert (found.time, found.cookie, found.pid, found.uid) == (5_000_000_123, 7, 42, 1000)
    assert (found.source_port, found.destination_port, found.signal, found.sender) == (40000, 443, 9, 3)


@pytest.mark.parametrize("kind", EventKind)
def test_json_is_the_document(kind: EventKind) -> None:
    for verdict in range(len(TOTALS)):
        for protocol in (6, 17, 132):
            each = event(kind, verdict=verdict, rule=verdict, protocol=protocol, signal=9, sender=1)
            assert json.loads(READER.json(each)) == READER.read(each)


def test_lines_are_for_people() -> None:
    assert line_of(READER.read(event())).endswith(
        'default/pod-7": cu"rl (42) → [fd00::9]:443 tcp: outbound captured, to 15001, O10'
    )
    assert line_of(READER.read(event(EventKind.KILLED, signal=9, sender=8))).endswith(
        'cu"rl (42) was killed by process 8: SIGKILL'
    )
    assert line_of(READER.read(event(EventKind.CLOSED))).endswith("does not listen on [fd00::9]:443 any more")


@pytest.mark.parametrize(
    ("destination", "takes"),
    [
        ("", True),
        (":443", True),
        (":80", False),
        ("fd00::/8", True),
        ("fd00::9", True),
        ("[fd00::9]:443", True),
        ("[fd00::9]:80", False),
        ("10.0.0.0/8", False),
    ],
)
def test_destinations_are_filtered(destination: str, takes: bool) -> None:
    assert Wanted.of(destination, None).takes(event()) is takes


def test_verdicts_are_filtered_and_listeners_have_none() -> None:
    assert Wanted.of(None, "captured").takes(event())
    assert not Wanted.of(None, "denied").takes(event())
    assert not Wanted.of(None, "captured").takes(event(EventKind.LISTENING))


@pytest.mark.parametrize("text", ["10.0.0.0/33", "host:80", "1.2.3.4:http", "[::1"])
def test_what_is_no_destination_is_refused(text: str) -> None:
    with pytest.raises(BadFilter, match="is no destination; give"):
        Wanted.of(text, None)
