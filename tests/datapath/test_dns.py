"""DNS capture: port 53 goes to the agent's resolver, and answers come from the nameserver that was asked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cni.policy.annotations import CapturePolicy
from tests.datapath.wires import PROXY, Namespace, Wire
from tests.lab.inside import PYTHON

RESOLVER = Path(__file__).with_name("resolver.py")
POLICY = CapturePolicy(dual_stack=True, dns_capture=True)

# Asks each nameserver in turn on one socket, then collects the answers in the order they come.
ASK = """
import json, socket, sys
how, source, *servers = sys.argv[1:]
family = socket.AF_INET6 if ":" in servers[0] else socket.AF_INET
s = socket.socket(family, socket.SOCK_DGRAM)
s.settimeout(2)
if source:
    host, port = source.rsplit("/", 1)
    s.bind((host, int(port)))
seen = []
try:
    if how == "connected":
        s.connect((servers[0], 53))
        s.send(b"one")
        data, sender = s.recvfrom(512)
        seen.append({**json.loads(data), "from": sender[:2], "peer_name": s.getpeername()[:2],
                     "local": s.getsockname()[0]})
    else:
        for number, server in enumerate(servers):
            s.sendto(str(number).encode(), (server, 53))
        for _ in servers:
            data, sender = s.recvfrom(512)
            seen.append({**json.loads(data), "from": sender[:2]})
except OSError as error:
    seen.append({"error": error.strerror or str(error)})
print(json.dumps(seen))
"""


def resolver(end: Namespace, name: str, port: int, *addresses: str, uid: int) -> None:
    end.start([*PYTHON, RESOLVER.read_text(), name, str(port), *addresses], uid)


@pytest.fixture
def ask(wire: Wire) -> Callable[..., list[dict[str, Any]]]:
    """Queries from a pod with the agent's resolver in it and a nameserver outside."""
    wire.enrol(POLICY)
    resolver(wire.pod, "agent", 15053, "127.0.0.1", "::1", uid=PROXY)
    resolver(wire.peer, "nameserver", 53, "0.0.0.0", "::", uid=0)

    def asking(how: str, *servers: object, source: str = "", uid: int = 1000) -> list[dict[str, Any]]:
        seen: list[dict[str, Any]] = wire.pod.python(ASK, how, source, *servers, uid=uid)
        return seen

    return asking


SERVERS = ["10.9.0.1", "fd99::1", "::ffff:10.9.0.1"]
OWN = {"10.9.0.1": "10.9.0.2", "fd99::1": "fd99::2", "::ffff:10.9.0.1": "::ffff:10.9.0.2"}


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("how", ["connected", "unconnected"])
def test_a_query_is_answered_by_the_agent_as_if_by_the_nameserver(ask: Any, how: str, server: str) -> None:
    (seen,) = ask(how, server)
    assert (seen["who"], seen["from"]) == ("agent", [server, 53])
    assert seen["peer"][0] == OWN[server].removeprefix("::ffff:")
    if how == "connected":
        assert (seen["peer_name"], seen["local"]) == ([server, 53], OWN[server])


@pytest.mark.parametrize("server", ["127.0.0.1", "127.0.0.53", "10.9.0.2", "::1", "fd99::2"])
@pytest.mark.parametrize("how", ["connected", "unconnected"])
def test_resolvers_of_the_pods_own_are_captured_too(ask: Any, how: str, server: str) -> None:
    (seen,) = ask(how, server)
    assert (seen["who"], seen["from"]) == ("agent", [server, 53])


@pytest.mark.parametrize(
    "servers",
    [
        ("10.9.0.1", "10.9.0.7", "127.0.0.53"),
        ("fd99::1", "fd99::7", "2001:db8::53"),
        ("::ffff:10.9.0.1", "::ffff:10.9.0.7"),
        ("::ffff:10.9.0.1", "fd99::1", "::ffff:10.9.0.7", "fd99::7"),
    ],
)
def test_several_nameservers_on_one_socket_each_answer_for_themselves(ask: Any, servers: tuple[str, ...]) -> None:
    seen = ask("unconnected", *servers)
    assert {answer["who"] for answer in seen} == {"agent"}
    assert {answer["query"]: answer["from"] for answer in seen} == {
        str(number): [server, 53] for number, server in enumerate(servers)
    }


@pytest.mark.parametrize("source", ["10.9.0.2/0", "10.9.0.2/5353", "0.0.0.0/5354"])
@pytest.mark.parametrize("how", ["connected", "unconnected"])
def test_bound_sockets_ask_too(ask: Any, how: str, source: str) -> None:
    servers = ["10.9.0.1"] if how == "connected" else ["10.9.0.1", "10.9.0.7"]
    for number, seen in enumerate(sorted(ask(how, *servers, source=source), key=lambda each: str(each.get("query")))):
        assert (seen["who"], seen["from"]) == ("agent", [servers[number], 53])


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("how", ["connected", "unconnected"])
def test_the_agents_own_queries_reach_the_nameserver(ask: Any, how: str, server: str) -> None:
    (seen,) = ask(how, server, uid=PROXY)
    assert (seen["who"], seen["from"]) == ("nameserver", [server, 53])


@pytest.mark.parametrize("server", SERVERS)
def test_dns_over_tcp_goes_to_the_agent(wire: Wire, ask: Any, server: str) -> None:
    code = """
import json, socket, sys
s = socket.create_connection((sys.argv[1], 53), 2)
print(json.dumps({**json.loads(s.makefile().read()), "peer_name": s.getpeername()[:2]}))
"""
    seen = wire.pod.python(code, server)
    assert (seen["who"], seen["peer_name"]) == ("agent", [server, 53])
    assert seen["peer"][0] == OWN[server].removeprefix("::ffff:")
    assert wire.pod.python(code, server, uid=PROXY)["who"] == "nameserver"


def test_no_agent_means_no_answer(wire: Wire) -> None:
    wire.enrol(POLICY)
    resolver(wire.peer, "nameserver", 53, "0.0.0.0", uid=0)
    (seen,) = wire.pod.python(ASK, "connected", "", "10.9.0.1")
    assert seen == {"error": "Connection refused"}


def test_without_dns_capture_udp_is_left_alone(wire: Wire) -> None:
    wire.enrol()
    resolver(wire.pod, "agent", 15053, "127.0.0.1", uid=PROXY)
    resolver(wire.peer, "nameserver", 53, "0.0.0.0", uid=0)
    for how in ("connected", "unconnected"):
        (seen,) = wire.pod.python(ASK, how, "", "10.9.0.1")
        assert (seen["who"], seen["from"]) == ("nameserver", ["10.9.0.1", 53])


def test_an_excluded_port_53_goes_to_the_nameserver(wire: Wire) -> None:
    wire.enrol(CapturePolicy(dns_capture=True, exclude_outbound_ports=frozenset({53})))
    resolver(wire.peer, "nameserver", 53, "0.0.0.0", uid=0)
    (seen,) = wire.pod.python(ASK, "unconnected", "", "10.9.0.1")
    assert seen["who"] == "nameserver"
