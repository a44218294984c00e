"""Late outbound: when its Pod is being deleted and its proxy listens no more, what a pod sends passes."""

import errno
import os
import subprocess

import pytest

from bpf.layout import Cookie, PodFlags
from cni.enrolment.uncaptured import listed
from cni.policy.annotations import CapturePolicy
from tests.datapath.test_denied_ports import UDP
from tests.datapath.wires import PROXY, Wire

LATE = CapturePolicy(dual_stack=True, late_outbound=True)
REFUSED = {"error": os.strerror(errno.ECONNREFUSED)}


def delete(wire: Wire) -> None:
    """As the agent does when it learns that the Pod is being deleted."""
    wire.kernel.enrolments.change(wire.sandbox.cookie, lambda terms: terms.flagged(PodFlags.DELETED, True))


def end(wire: Wire, *names: str) -> None:
    """End processes that mesh() has started."""
    for process in [each for each in wire.pod.started if set(names) & set(map(str, _argv(each)))]:
        wire.pod.end(process)


def _argv(process: "subprocess.Popen[str]") -> list[object]:
    return list(process.args) if isinstance(process.args, list) else []


@pytest.mark.claim("once the Pod is being deleted and its proxy listens no more")
@pytest.mark.parametrize("family", ["ip4", "ip6"])
def test_outbound_passes_once_both_have_come(wire: Wire, family: str) -> None:
    wire.mesh(LATE)
    peer = getattr(wire.peer, family)
    assert wire.pod.dial(peer, 8080)["who"] == "outbound"
    delete(wire)
    assert wire.pod.dial(peer, 8080)["who"] == "outbound"
    end(wire, "outbound")
    assert wire.pod.dial(peer, 8080)["who"] == "remote"
    assert wire.peer.dial(getattr(wire.pod, family), 8080)["who"] == "inbound"
    end(wire, "inbound")
    assert wire.peer.dial(getattr(wire.pod, family), 8080) == REFUSED


def test_before_its_pod_is_deleted_a_proxy_that_has_gone_means_refusal(wire: Wire) -> None:
    wire.mesh(LATE)
    end(wire, "outbound")
    for peer in (wire.peer.ip4, wire.peer.ip6):
        assert wire.pod.dial(peer, 8080) == REFUSED
    delete(wire)
    for peer in (wire.peer.ip4, wire.peer.ip6):
        assert wire.pod.dial(peer, 8080)["who"] == "remote"


def test_a_pod_that_does_not_ask_for_it_is_refused_all_along(wire: Wire) -> None:
    wire.mesh()
    delete(wire)
    end(wire, "outbound")
    assert wire.pod.dial(wire.peer.ip4, 8080) == REFUSED


@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1", "::", "::1"])
def test_one_listener_that_is_left_is_enough_for_capture(wire: Wire, address: str) -> None:
    """As of a proxy that has closed its listener of the other family, or of a successor."""
    wire.mesh(LATE)
    code = """
import socket, sys
s = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
if s.family == socket.AF_INET6:
    s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
s.bind((sys.argv[1], 15001))
s.listen()
print("ready", flush=True)
sys.stdin.read()
"""
    other = wire.pod.start(["/usr/bin/python3", "-I", "-S", "-c", code, address], PROXY)
    delete(wire)
    end(wire, "outbound")
    closed = wire.peer.ip6 if "." in address else wire.peer.ip4
    assert "who" not in wire.pod.dial(closed, 8080)
    wire.pod.end(other)
    assert wire.pod.dial(closed, 8080)["who"] == "remote"


def test_a_proxy_that_comes_back_captures_again(wire: Wire) -> None:
    wire.mesh(LATE)
    delete(wire)
    end(wire, "outbound")
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "remote"
    wire.pod.serve("outbound", "15001", uid=PROXY)
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "outbound"


def test_where_no_proxy_has_ever_listened_none_has_gone(wire: Wire) -> None:
    wire.enrol(LATE)
    wire.peer.serve("remote", "8080", uid=0)
    delete(wire)
    assert wire.pod.dial(wire.peer.ip4, 8080) == REFUSED


@pytest.mark.parametrize("how", ["connected", "unconnected"])
@pytest.mark.parametrize("family", ["ip4", "ip6"])
def test_dns_passes_too(wire: Wire, family: str, how: str) -> None:
    wire.mesh(LATE.model_copy(update={"dns_capture": True}))
    delete(wire)
    peer = getattr(wire.peer, family)
    end(wire, "outbound")
    assert wire.pod.python(UDP, peer, 53, how) == "sent"
    assert [(each.port, each.rule) for each in listed(wire.kernel.tables)[wire.sandbox.cookie]] == [
        (53, "late-outbound")
    ]


def test_what_passes_late_is_listed_and_not_denied(wire: Wire) -> None:
    wire.mesh(LATE.model_copy(update={"uncaptured": "deny"}))
    delete(wire)
    end(wire, "outbound")
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "remote"
    (found,) = listed(wire.kernel.tables)[wire.sandbox.cookie]
    assert (found.address, found.port, found.rule, found.is_refused) == (wire.peer.ip4, 8080, "late-outbound", False)


def test_denied_ports_stay_denied(wire: Wire) -> None:
    wire.mesh(LATE.model_copy(update={"deny_outbound_ports": frozenset((8080,))}))
    delete(wire)
    end(wire, "outbound")
    assert wire.pod.dial(wire.peer.ip4, 8080) == {"error": os.strerror(errno.EPERM)}
    assert wire.pod.dial(wire.peer.ip4, 9090)["who"] == "remote"


def test_late_and_early_outbound_do_not_meet(wire: Wire) -> None:
    wire.enrol(LATE.model_copy(update={"early_outbound": True}))
    wire.peer.serve("remote", "8080", uid=0)
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "remote"
    proxy = wire.pod.serve("outbound", "15001", uid=PROXY)
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "outbound"
    wire.pod.end(proxy)
    assert wire.pod.dial(wire.peer.ip4, 8080) == REFUSED
    delete(wire)
    assert wire.pod.dial(wire.peer.ip4, 8080)["who"] == "remote"


def test_nothing_of_a_late_pod_is_left_behind(wire: Wire) -> None:
    wire.mesh(LATE)
    assert wire.kernel.tables.started.get(Cookie(wire.sandbox.cookie)) is not None
    wire.kernel.enrolments.remove(wire.sandbox.cookie)
    assert wire.kernel.tables.started.get(Cookie(wire.sandbox.cookie)) is None
