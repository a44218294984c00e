"""Events of the programs as documents, as JSON and as lines, and the filters for them."""

import json
import signal
from ipaddress import ip_address

import pytest
import yaml

from bpf.layout import RULES, TOTALS, Address, Event, EventKind
from installer.commands.trace.follow_events import Interruption
from installer.commands.trace.forms import FORMS, line_of
from installer.commands.trace.told_events import Known, Reader
from installer.commands.trace.wanted import BadFilter, Wanted

UNKNOWN_KIND = 9
READER = Reader(lambda cookie: f'default/pod-{cookie}"')


def event(kind: int = EventKind.CONNECT, **fields: object) -> Event:
    made = Event(time=5_000_000_123, cookie=7, kind=kind, verdict=1, rule=RULES.index("O10"), protocol=6)
    made.pid, made.uid, made.command = 42, 1000, b'cu"rl'
    made.source, made.source_port = Address.of(ip_address("10.0.0.1")), 40000
    made.destination, made.destination_port = Address.of(ip_address("fd00::9")), 443
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_what_a_newer_version_tells_is_shown_by_its_number() -> None:
    later = event(rule=37, verdict=12)
    found = READER.read(later)
    assert (found["rule"], found["direction"], found["verdict"]) == ("rule 37", "unknown", "verdict 12")
    assert line_of(found).endswith("tcp: unknown verdict 12 (rule 37)\n")
    unknown = READER.read(event(UNKNOWN_KIND))
    assert (unknown["pod"], unknown["event"]) == ('default/pod-7"', "event 9")
    assert line_of(unknown).endswith('default/pod-7": event 9\n')


def test_a_process_cannot_write_to_a_terminal_by_its_name() -> None:
    for name in (b"\x1b[2J", "\u202egpj".encode(), b"a\nb", b"\x7f\x9b"):
        assert READER.read(event(command=name))["process"].isprintable()
    assert READER.read(event(command="größe".encode()))["process"] == "größe"


@pytest.mark.parametrize("kind", EventKind)
def test_each_form_says_the_same(kind: EventKind) -> None:
    for name in (b"curl", b"- [yes", b"\x1b\x85", "größe".encode(), b"'\\\"#:", b"\xff"):
        document = READER.read(event(kind, command=name, signal=9, sender=1))
        written = FORMS["yaml"](document)
        assert written.startswith("---\n")
        assert FORMS["json"](document).count("\n") == 1
        assert yaml.safe_load(written) == json.loads(FORMS["json"](document)) == document


def test_lines_are_for_people() -> None:
    assert line_of(READER.read(event())).endswith(
        'default/pod-7": cu"rl (42) → [fd00::9]:443 tcp: outbound captured, to 15001 '
        "(O10: its address is in an included range)\n"
    )
    named = Reader(READER._name_of, Known({bytes(Address.of(ip_address("fd00::9"))): "shop/db"}, {7: 1000}))
    assert "proxy (42) → shop/db ([fd00::9]:443) tcp" in line_of(named.read(event()))
    assert line_of(READER.read(event(EventKind.KILLED, signal=9, sender=8))).endswith(
        'cu"rl (42) was killed by process 8: SIGKILL\n'
    )
    assert line_of(READER.read(event(EventKind.CLOSED))).endswith("does not listen on [fd00::9]:443 any more\n")


@pytest.mark.parametrize(
    ("destination", "takes"),
    [
        (None, True),
        (":443", True),
        (":80", False),
        ("fd00::/8", True),
        ("fd00::9", True),
        ("[fd00::9]:443", True),
        ("[fd00::9]:80", False),
        ("[fd00::9]", True),
        ("[fd00::/8]:443", True),
        ("fd00::8/8", True),
        ("10.0.0.0/8", False),
        ("::ffff:10.0.0.1", False),
    ],
)
def test_destinations_are_filtered(destination: str | None, takes: bool) -> None:
    assert Wanted.of(destination, None).takes(event()) is takes


@pytest.mark.parametrize(
    ("destination", "takes"),
    [
        ("10.1.2.3", True),
        ("10.1.2.3:65535", True),
        ("10.1.2.4/8", True),
        ("10.0.0.0/8:65535", True),
        ("::ffff:10.1.2.3", True),
        ("[::ffff:10.1.2.3]:65535", True),
        ("::ffff:10.1.0.0/112", True),
        ("::ffff:10.2.0.0/112", False),
        ("::/0", False),
        (":0", False),
    ],
)
def test_ipv4_is_ipv4_however_it_is_written(destination: str, takes: bool) -> None:
    to = event(destination=Address.of(ip_address("10.1.2.3")), destination_port=65535)
    assert Wanted.of(destination, None).takes(to) is takes


def test_verdicts_are_filtered_and_listeners_have_none() -> None:
    assert Wanted.of(None, "captured").takes(event())
    assert not Wanted.of(None, "denied").takes(event())
    assert not Wanted.of(None, "captured").takes(event(EventKind.LISTENING))
    assert not Wanted.of(None, "captured").takes(event(EventKind.KILLED))
    assert not Wanted.of(None, "captured").takes(event(verdict=len(TOTALS)))
    assert not Wanted.of(None, "captured").takes(event(UNKNOWN_KIND))


def test_filters_hold_together_and_can_be_turned_round() -> None:
    assert Wanted.of(None, "captured", 443, "outbound", "O10").takes(event())
    assert not Wanted.of(None, "captured", 443, "outbound", "O10", is_inverted=True).takes(event())
    assert not Wanted.of(None, None, direction="inbound").takes(event())
    assert not Wanted.of(None, None, rule="O1").takes(event())
    assert Wanted.of(None, None, rule="O1", is_inverted=True).takes(event(EventKind.KILLED))
    assert not Wanted.of(None, None, rule="O10").takes(event(EventKind.KILLED))
    with pytest.raises(BadFilter, match='":80" has port 80, and --port says 443'):
        Wanted.of(":80", None, port=443)


@pytest.mark.parametrize("kind", [EventKind.LISTENING, EventKind.CLOSED])
def test_who_asks_for_refusals_sees_whether_the_proxy_listens(kind: EventKind) -> None:
    assert Wanted.of(None, "refused").takes(event(kind))
    assert not Wanted.of(None, "refused").takes(event(EventKind.KILLED))


BAD_DESTINATIONS = """
    10.0.0.0/33 host:80 1.2.3.4:http [::1 [::1]80 [] []:80 :99999 :65536 :-5 :+5 :8_0 :٣ :
    1.2.3.4: [::1]: [fd00::]/8 ::1]
"""


@pytest.mark.parametrize("text", ["", *BAD_DESTINATIONS.split()])
def test_what_is_no_destination_is_refused(text: str) -> None:
    with pytest.raises(BadFilter, match="is not a destination; give"):
        Wanted.of(text, None)


def test_asked_once_it_ends_by_itself_and_asked_twice_it_stops() -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with Interruption() as interruption:
        assert not interruption.is_asked
        signal.raise_signal(signal.SIGTERM)
        assert interruption.is_asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_who_is_to_ignore_ctrl_c_goes_on_doing_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGINT)
            assert not interruption.is_asked
    finally:
        signal.signal(signal.SIGINT, before)
