"""Istio's rule sets for a pod in ambient mode: the oracle that sidestep is compared with.

Written from what the rules do and in what order (docs/semantics.md), for iptables-restore and ip6tables-restore.
"""

from cni.policy.ambient_policy import AmbientPolicy
from tests.conformance.rules import INBOUND, OUTBOUND, RESOLVER, TUNNEL, Tables

_ZTUNNEL, _TO_APPLICATION = "0x539/0xfff", "0x111/0xfff"
_EVERY_BIT = "--nfmask 0xffffffff --ctmask 0xffffffff"
# kubelet's probes have these as source: the node's rules see to that
PROBES = {4: "169.254.7.127/32", 6: "fd16:9254:7127:1337:ffff:ffff:ffff:ffff/128"}
# what brings the application's answers to the client's address back to ztunnel
COMMANDS = ("rule add fwmark 0x111/0xfff pref 32764 lookup 100", "route add local default dev lo table 100")


def ambient_restore_text(policy: AmbientPolicy, version: int) -> str:
    """The rules of one family (4 or 6) for a pod with this policy."""
    tables, loopback = Tables(), "127.0.0.1/32" if version == 4 else "::1/128"
    not_loopback, not_ztunnel = f"! -d {loopback}", f"-m mark ! --mark {_ZTUNNEL}"

    tables.add("mangle", "PREROUTING", "-j ISTIO_PRERT")
    tables.add("mangle", "OUTPUT", "-j ISTIO_OUTPUT")
    tables.add("mangle", "ISTIO_PRERT", f"-m mark --mark {_ZTUNNEL} -j CONNMARK --set-xmark {_TO_APPLICATION}")
    restore = f"-m connmark --mark {_TO_APPLICATION} -j CONNMARK --restore-mark {_EVERY_BIT}"
    tables.add("mangle", "ISTIO_OUTPUT", restore)

    tables.add("nat", "OUTPUT", "-j ISTIO_OUTPUT")
    tables.add("nat", "PREROUTING", "-j ISTIO_PRERT")
    tables.declare("nat", "ISTIO_PRERT")
    if not policy.bypass_inbound_capture:
        tables.add("nat", "ISTIO_PRERT", f"-s {PROBES[version]} -p tcp -m tcp -j ACCEPT")
        capture = f"{not_loopback} -p tcp ! --dport {TUNNEL} {not_ztunnel} -j REDIRECT --to-ports {INBOUND}"
        tables.add("nat", "ISTIO_PRERT", capture)
    tables.add("nat", "ISTIO_OUTPUT", f"-d {PROBES[version]} -p tcp -m tcp -j ACCEPT")
    if policy.dns_capture:
        resolve = f"-j REDIRECT --to-ports {RESOLVER}"
        tables.add("nat", "ISTIO_OUTPUT", f"! -o lo -p udp {not_ztunnel} -m udp --dport 53 {resolve}")
        tables.add("nat", "ISTIO_OUTPUT", f"{not_loopback} -p tcp --dport 53 {not_ztunnel} {resolve}")
    tables.add("nat", "ISTIO_OUTPUT", f"-p tcp -m mark --mark {_TO_APPLICATION} -j ACCEPT")
    tables.add("nat", "ISTIO_OUTPUT", f"{not_loopback} -o lo -j ACCEPT")
    tables.add("nat", "ISTIO_OUTPUT", f"{not_loopback} -p tcp {not_ztunnel} -j REDIRECT --to-ports {OUTBOUND}")

    if policy.dns_capture:
        tables.add("raw", "PREROUTING", "-j ISTIO_PRERT")
        tables.add("raw", "OUTPUT", "-j ISTIO_OUTPUT")
        tables.add("raw", "ISTIO_OUTPUT", f"-p udp -m mark --mark {_ZTUNNEL} -m udp --dport 53 -j CT --zone 1")
        tables.add("raw", "ISTIO_PRERT", f"-p udp {not_ztunnel} -m udp --sport 53 -j CT --zone 1")
    return tables.text()
