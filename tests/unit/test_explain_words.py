"""Every verdict that the reference can come to is told in words, with its annotation where there is one."""

from ipaddress import ip_address
from itertools import product

import pytest

from bpf.layout import RULES
from cni.enrolment.entries import Identity
from cni.netns.proc_net import rows
from cni.policy.annotations import CapturePolicy
from cni.policy.decision import Action, Inbound, Outbound, Verdict
from installer.commands.explain.explainer import Explanation
from installer.commands.explain.explanation import explanation_document, explanation_text

POD = Identity("uid", "pod", "default", "container", "net", "eth0")
REMOTE = ip_address("203.0.113.7")
OUTBOUND = [rule for rule in RULES if rule and rule[0] != "I"] + ["T", "no IPv6"]
INBOUND = ["I1", "I2", "I3", "I4", "I5", "deny", "self", "transit", "UDP", "no IPv6"]


@pytest.mark.parametrize(
    ("rule", "action"),
    [*product(OUTBOUND, ("pass", "proxy-outbound")), *product(("O10",), ("proxy-inbound", "dns", "refuse"))],
)
def test_outbound(rule: str, action: Action) -> None:
    asked = Outbound(REMOTE, 80, ip_address("10.0.0.5"))
    document = explanation_document(POD, Explanation(CapturePolicy(), asked, Verdict(action, rule)), None)
    assert document["why"] and f"rule {rule}: " in explanation_text(document)
    assert explanation_text(document).startswith("default/pod, uid 0 gid 0, from 10.0.0.5 → 203.0.113.7:80 (TCP)\n")


@pytest.mark.parametrize(
    ("rule", "action"), [*product(INBOUND, ("pass", "proxy-inbound")), ("I4", "refuse"), ("deny", "refuse")]
)
def test_inbound(rule: str, action: Action) -> None:
    found = Explanation(CapturePolicy(), Inbound(8080, REMOTE), Verdict(action, rule))
    document = explanation_document(POD, found, None)
    assert document["why"] and explanation_text(document).startswith("203.0.113.7 → default/pod, port 8080 (TCP)\n")


def test_a_long_annotation_is_cut_and_the_part_that_fits_shown() -> None:
    policy = CapturePolicy(exclude_outbound_ports=frozenset(range(1000, 1100)))
    found = Explanation(policy, Outbound(REMOTE, 1077), Verdict("pass", "O1"))
    text = explanation_text(explanation_document(POD, found, None))
    assert "(100 elements)" in text and ", matching element 1077" in text


def test_sockets_of_both_families_are_read() -> None:
    lines = [
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode",
        "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4711 1",
        "   1: 0000000000000000FFFF00000200140A:C350 0000000000000000FFFF00000100140A:0050 02 0:0 0:0 0 0 0 4712 1",
        "   2: 000080FE000000000000000001000000:0016 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 4713 1",
    ]
    found = list(rows(lines))
    assert [(str(row.local_ip), row.local_port, row.state, row.inode) for row in found] == [
        ("127.0.0.1", 8080, 10, 4711),
        ("10.20.0.2", 50000, 2, 4712),
        ("fe80::1", 22, 10, 4713),
    ]
    assert (str(found[1].remote_ip), found[1].remote_port) == ("10.20.0.1", 80)
