"""Ambient mode: how a pod is enrolled and followed, and how the node's ztunnels become known."""

import subprocess
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from bpf.errors import TableFull
from bpf.kernel import cgroup2_root
from bpf.layout import ZTUNNELS, PodFlags
from cni.enrolment.entries import Identity
from cni.enrolment.follow import Follower
from cni.enrolment.ztunnels import Ztunnels as Known
from cni.policy.ambient_policy import AmbientPolicy
from tests.datapath.adopting import Parts
from tests.datapath.ambient import Ztunnels
from tests.datapath.wires import Kernel, Wire, ip_command
from tests.lab.cgroups import remove_cgroup
from tests.lab.waiting import wait_until
from tests.lab.ztunnel import Told

FAMILIES = ["ip4", "ip6"]
IDENTITY = Identity("uid", "pod", "default", "sandbox", "net", "eth0")
WHOLE = AmbientPolicy(dns_capture=True, bypass_inbound_capture=True, trust_mark=True)


def admit(agent: Parts, wire: Wire, policy: AmbientPolicy) -> None:
    """Enrol a wire's pod as an agent does."""
    with wire.pod.path.open() as netns:
        agent.admission.admit_as(IDENTITY, policy, netns.fileno())


def told(wire: Wire, *args: str) -> str:
    """What iproute2 says of the pod's namespace."""
    return subprocess.run(["ip", "-n", wire.pod.path.name, *args], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("family", ["-4", "-6"])
def test_the_answers_to_ztunnel_are_led_back_as_istio_does(wire: Wire, agent: Parts, family: str) -> None:
    for _ in range(2):  # an ADD may be tried again
        admit(agent, wire, AmbientPolicy())
        assert told(wire, family, "rule").count("32764:\tfrom all fwmark 0x111/0xfff lookup 100") == 1
        assert "local default dev lo" in told(wire, family, "route", "show", "table", "100")


def test_nobody_is_at_the_address_that_sidecars_use_and_ztunnel_does_not(wire: Wire, agent: Parts) -> None:
    admit(agent, wire, AmbientPolicy())
    assert wire.pod.dial("::6", 80) == {"error": "No route to host"}
    ip_command("-n", wire.peer.path.name, "addr", "add", "::6/128", "dev", "lo")
    ip_command("-n", wire.pod.path.name, "-6", "route", "add", "::6/128", "via", wire.peer.ip6)
    wire.pod.serve("app", "8080")
    assert wire.pod.dial("::6", 80) == {"error": "No route to host"}
    assert wire.peer.dial(wire.pod.ip6, 8080, "::6", uid=0) == {"error": "timed out"}


def test_the_entry_says_what_the_policy_asks_for(wire: Wire, agent: Parts) -> None:
    admit(agent, wire, WHOLE)
    entry = agent.enrolments.entry(wire.sandbox.cookie)
    assert entry is not None
    of_namespace = PodFlags.ROUTES | PodFlags.LOOPBACK_STAYS
    wanted = PodFlags.AMBIENT | PodFlags.IPV6 | PodFlags.DNS | PodFlags.BYPASS_INBOUND | PodFlags.TRUSTS_MARK
    assert PodFlags(entry.flags) & ~of_namespace == wanted
    with wire.pod.path.open() as netns:
        entries, cookie = agent.admission.wanted(IDENTITY, WHOLE, netns.fileno())
        assert agent.enrolments.differences(cookie, entries) == []
        entries, _ = agent.admission.wanted(IDENTITY, replace(WHOLE, dns_capture=False), netns.fileno())
        assert len(agent.enrolments.differences(cookie, entries)) == 1


def test_a_changed_policy_counts_for_the_next_connection(wire: Wire, agent: Parts, ztunnels: Ztunnels) -> None:
    assert ztunnels.start().add("uid", wire.pod.path) == "ok"
    wire.pod.serve("app", "8080")
    admit(agent, wire, AmbientPolicy(bypass_inbound_capture=True))
    assert wire.peer.dial(wire.pod.ip4, 8080, uid=0)["who"] == "app"
    admit(agent, wire, AmbientPolicy())
    assert wire.peer.dial(wire.pod.ip4, 8080, uid=0) == {"error": "Connection refused"}


def test_a_pod_without_ipv6_has_no_way_there(wire: Wire, agent: Parts) -> None:
    for command in ("addr flush dev eth0", "route flush default"):
        ip_command("-n", wire.pod.path.name, "-6", *command.split())
    admit(agent, wire, AmbientPolicy())
    assert wire.pod.dial("2001:db8::7", 80) == {"error": "Network is unreachable"}
    assert wire.pod.dial(wire.peer.ip4, 9090) == {"error": "Connection refused"}


def test_a_pod_whose_ipv6_is_disabled_is_captured_in_ipv4(wire: Wire, agent: Parts) -> None:
    disable = "for each in all default lo eth0; do echo 1 > /proc/sys/net/ipv6/conf/$each/disable_ipv6; done"
    subprocess.run(["nsenter", f"--net={wire.pod.path}", "sh", "-c", disable], check=True)
    admit(agent, wire, AmbientPolicy())
    assert "error" in wire.pod.dial("2001:db8::7", 80)
    assert wire.pod.dial(wire.peer.ip4, 9090) == {"error": "Connection refused"}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_address_that_comes_later_is_the_pods(wire: Wire, agent: Parts, ztunnels: Ztunnels, family: str) -> None:
    ztunnel = ztunnels.start()
    admit(agent, wire, AmbientPolicy())
    assert ztunnel.add("uid", wire.pod.path) == "ok"
    wire.pod.serve("app", "8080")
    later = ip_address("10.9.0.7" if family == "ip4" else "fd99::7")
    thread = Follower(agent.enrolments, agent.proxies, agent.kernel.procfs.path)
    with thread.running():
        ip_command(
            "-n",
            wire.pod.path.name,
            "addr",
            "add",
            f"{later}/{24 if family == 'ip4' else 64}",
            "dev",
            "eth0",
            *([] if family == "ip4" else ["nodad"]),
        )
        wait_until(lambda: wire.pod.dial(later, 8080).get("who") == "app", "the address to be known")
    seen = wire.peer.dial(later, 8080, uid=0)
    assert (seen["who"], seen["then"]["who"]) == ("ztunnel-inbound", "app")
    assert seen["then"]["peer"][0] == str(getattr(wire.peer, family))


def test_listeners_that_nobody_has_seen_begin_are_looked_for(wire: Wire, agent: Parts, ztunnels: Ztunnels) -> None:
    assert ztunnels.start().add("uid", wire.pod.path) == "ok"
    wire.pod.serve("app", "8080")
    admit(agent, wire, AmbientPolicy())
    cookie = wire.sandbox.cookie
    inodes = {cookie: wire.pod.path.stat().st_ino}
    wire.pod.start(["/bin/sh", "-c", "echo ready; exec sleep 1000"], 0)  # by which the namespace is found
    assert (agent.adoption.listen(inodes, {}), agent.adoption.listen(inodes, {})) == (1, 0)
    assert wire.peer.dial(wire.pod.ip4, 8080, uid=0)["then"]["who"] == "app"


def test_a_ztunnel_is_known_from_its_process_until_its_cgroup_has_gone(
    kernel: Kernel, ztunnels: Ztunnels, make_wire: Callable[[], Wire]
) -> None:
    known = Known(kernel.tables, lambda: [kernel.cgroup])
    one, other = ztunnels.start(is_known=False), ztunnels.start(is_known=False)
    ids = {known.learn(each.pid) for each in (one, other, one)}
    assert known.known() == ids and len(ids) == 2
    assert known.forget_gone() == frozenset()
    gone = _cgroup_of(one)
    one.stop()
    remove_cgroup(gone)
    assert Known(kernel.tables, lambda: [kernel.cgroup]).forget_gone() == ids - known.known()
    assert known.known() == {known.learn(other.pid)}


def test_more_ztunnels_than_there_is_room_for_are_refused(kernel: Kernel, ztunnels: Ztunnels) -> None:
    kernel.tables.set_ztunnels(range(1, ZTUNNELS + 1))
    with pytest.raises(TableFull, match=f"room for {ZTUNNELS}"):
        kernel.tables.set_ztunnels(range(1, ZTUNNELS + 2))
    known = Known(kernel.tables, lambda: [kernel.cgroup])
    assert known.learn(ztunnels.start(is_known=False).pid) in known.known()  # the others have gone long ago


def _cgroup_of(process: Told) -> Path:
    lines = Path(f"/proc/{process.pid}/cgroup").read_text().splitlines()
    path = next(line.removeprefix("0::/") for line in lines if line.startswith("0::"))
    return cgroup2_root() / path


def test_a_ztunnel_among_everybody_in_the_root_of_cgroup2_is_said_to_be(
    kernel: Kernel, ztunnels: Ztunnels, capsys: pytest.CaptureFixture[str]
) -> None:
    """As all containers are whose runtime uses cgroup version 1."""
    with subprocess.Popen(["sleep", "100"]) as process:
        try:
            (cgroup2_root() / "cgroup.procs").write_text(str(process.pid))
            assert Known(kernel.tables, lambda: [kernel.cgroup]).learn(process.pid) == cgroup2_root().stat().st_ino
        finally:
            process.kill()
    assert "ztunnel.not_told_apart" in capsys.readouterr().out
