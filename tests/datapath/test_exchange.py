"""Running pods that go from Istio's rules to sidestep and back, with connections open and new ones all the time."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cni.enrolment import exchange as exchanges
from cni.enrolment.exchange import Exchange
from cni.errors import NotExchanged, RulesNotChanged
from cni.netns.netfilter import is_captured_by_istio
from cni.netns.sandbox import visit
from cni.policy.annotations import policy_of
from cni.policy.membership import skip_pod
from cni.policy.pod import Pod
from tests.conformance.rules import restore_text
from tests.datapath.adopting import Parts, Running, running
from tests.datapath.test_dns import resolver
from tests.datapath.wires import PROXY, Namespace, Wire
from tests.lab.inside import PYTHON, popen

TOOLS = ["iptables-nft", "iptables-legacy", "nft"]
# Istio's rules in its native nftables mode, as far as these tests send anything
NFT = """
table inet istio-proxy-nat {
  chain prerouting { type nat hook prerouting priority dstnat; policy accept; meta l4proto tcp jump istio-inbound; }
  chain output { type nat hook output priority -100; policy accept; jump istio-output; }
  chain istio-inbound { meta l4proto tcp tcp dport 15008 return; meta l4proto tcp jump istio-in-redirect; }
  chain istio-redirect { meta l4proto tcp redirect to :15001; }
  chain istio-in-redirect { meta l4proto tcp redirect to :15006; }
  chain istio-output {
    oifname "lo" ip saddr 127.0.0.6 return
    oifname "lo" meta skuid != 1337 return
    meta skuid 1337 return
    ip daddr 127.0.0.1 return
    ip6 daddr ::1 return
    jump istio-redirect
  }
}
table inet istio-proxy-raw {
  chain output { type filter hook output priority raw; policy accept; udp dport 15053 counter; }
}
"""
# connects again and again until it is told to stop, a dozen times at least, and counts what it finds
LOAD = """
import json, select, socket, sys, time
host, port, who = sys.argv[1], int(sys.argv[2]), sys.argv[3]
good, bad = 0, []
print("ready", flush=True)
while good + len(bad) <= 10 or not select.select([sys.stdin], [], [], 0.002)[0]:
    client = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    client.settimeout(3)
    try:
        client.connect((host, port))
        seen = json.loads(client.makefile().readline())
        if (seen["who"], seen["original"]) == (who, [host, port]) and client.getpeername()[:2] == (host, port):
            good += 1
        else:
            bad.append(seen)
    except (OSError, ValueError) as error:
        bad.append(repr(error))
    client.close()
print(json.dumps([good, bad[:5], len(bad)]), flush=True)
"""
# asks again and again, with a socket for each query that is connected or not
QUERIES = """
import json, select, socket, sys
host, how = sys.argv[1:]
good, bad = 0, []
print("ready", flush=True)
while good + len(bad) <= 10 or not select.select([sys.stdin], [], [], 0.05)[0]:
    client = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    client.settimeout(3)
    try:
        if how == "connected":
            client.connect((host, 53))
            client.send(b"?")
        else:
            client.sendto(b"?", (host, 53))
        data, sender = client.recvfrom(512)
        if (json.loads(data)["who"], sender[:2]) == ("agent", (host, 53)):
            good += 1
        else:
            bad.append([data.decode(), sender])
    except (OSError, ValueError) as error:
        bad.append(repr(error))
    client.close()
print(json.dumps([good, bad[:5], len(bad)]), flush=True)
"""
# listens, and accepts nothing until it is told to; two connections wait meanwhile, and SYNs of others are dropped
BUSY = """
import json, socket, sys
listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("0.0.0.0", 15006))
listener.listen(1)
print("ready", flush=True)
sys.stdin.readline()
while True:
    listener.accept()[0].sendall(json.dumps({"who": "inbound"}).encode() + b"\\n")
"""
# connects, however long it takes
PATIENT = """
import json, socket, sys
client = socket.socket()
client.settimeout(15)
print("ready", flush=True)
client.connect((sys.argv[1], 8080))
print(json.loads(client.makefile().readline())["who"], flush=True)
"""
# one connection; says what the other end says, each time it is asked to
OPEN = """
import socket, sys
host, port = sys.argv[1], int(sys.argv[2])
client = socket.create_connection((host, port), timeout=5)
lines = client.makefile()
lines.readline()
print("ready", flush=True)
for _ in sys.stdin:
    client.sendall(b"x")
    print(lines.readline().strip(), flush=True)
"""


@pytest.fixture
def pod(wire: Wire) -> Iterator[Running]:
    """A pod that runs with a proxy and an application, and a server outside."""
    wire.peer.serve("remote", "8080", "9090", uid=0)
    with running(wire) as made:
        made.serve("outbound", "15001", uid=PROXY)
        made.serve("inbound", "15006", uid=PROXY)
        wire.pod.serve("app", "8080")
        yield made


@pytest.fixture
def exchange(agent: Parts, tmp_path: Path) -> Exchange:
    agent.pods.pods = []
    return made_exchange(agent, tmp_path)


def made_exchange(agent: Parts, directory: Path) -> Exchange:
    return Exchange(
        agent.adoption,
        agent.pods,
        agent.kernel.pins,
        directory,
        lambda pod: skip_pod(pod, "", ()),
        agent.events,
        settling=0.5,
    )


def under_rules(agent: Parts, pod: Running, tool: str = "iptables-nft", api_pod: Pod | None = None) -> Pod:
    """Istio's rules in the pod's namespace, in both families, and its Pod."""
    api_pod = api_pod or pod.pod(pod.proxy)
    agent.pods.pods = [api_pod]
    for argv, text in texts(tool, api_pod):
        run_in(pod.wire.pod.path, argv, text)
    return api_pod


def texts(tool: str, pod: Pod) -> list[tuple[list[str], str]]:
    if tool == "nft":
        return [(["nft", "-f", "-"], NFT)]
    names = {4: tool, 6: tool.replace("ip", "ip6", 1)}
    lock = ["--wait=10"] if "legacy" in tool else []
    return [([f"{names[version]}-restore", *lock], restore_text(policy_of(pod), version)) for version in (4, 6)]


def run_in(netns: Path, argv: list[str], text: str = "") -> str:
    process = popen(netns, None, argv, 0, 0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    shown, _ = process.communicate(text, timeout=20)
    assert process.returncode == 0, argv
    return str(shown)


def rules(pod: Running) -> str:
    """What is there of rules, without counters and comments."""
    path = pod.wire.pod.path
    shown = [run_in(path, [f"{name}-save"]) for name in ("iptables-nft", "ip6tables-nft", "iptables-legacy")]
    lines = [line for text in shown for line in text.splitlines() if line.startswith("-A")]
    return "\n".join([*lines, run_in(path, ["nft", "-s", "list", "tables"])])


def has_rules(pod: Running) -> bool:
    with pod.wire.pod.path.open() as netns:
        return visit(netns.fileno(), lambda _: is_captured_by_istio())


@contextmanager
def load(pod: Running) -> Iterator[None]:
    """New connections in both directions and both families all the time; not one may fail or miss its proxy."""
    wire = pod.wire
    ways: list[tuple[Namespace, object, str]] = [
        (wire.pod, wire.peer.ip4, "outbound"),
        (wire.pod, wire.peer.ip6, "outbound"),
        (wire.peer, wire.pod.ip4, "inbound"),
        (wire.peer, wire.pod.ip6, "inbound"),
    ]
    loads = [origin.start([*PYTHON, LOAD, str(host), "8080", who], 1000) for origin, host, who in ways]
    try:
        yield
    finally:
        results = [json.loads(process.communicate("stop\n", timeout=10)[0]) for process in loads]
    for (_, host, who), (good, bad, count) in zip(ways, results, strict=True):
        assert not count, (host, who, count, bad)
        assert good > 10, (host, who)


class Open:
    """A connection that stays open."""

    def __init__(self, origin: Namespace, host: object) -> None:
        self._process = origin.start([*PYTHON, OPEN, str(host), "8080"], 1000)

    def ask(self) -> dict[str, Any]:
        """What the other end sees of it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        seen: dict[str, Any] = json.loads(self._process.stdout.readline())
        return seen


def open_connections(pod: Running) -> dict[str, Open]:
    wire = pod.wire
    return {
        "out4": Open(wire.pod, wire.peer.ip4),
        "out6": Open(wire.pod, wire.peer.ip6),
        "in4": Open(wire.peer, wire.pod.ip4),
        "in6": Open(wire.peer, wire.pod.ip6),
    }


def ask(connections: dict[str, Open]) -> None:
    """Every one must still have its own proxy at the other end."""
    for name, connection in connections.items():
        assert connection.ask()["who"] == ("outbound" if name.startswith("out") else "inbound"), name


@pytest.mark.parametrize("tool", TOOLS)
def test_a_pod_goes_to_sidestep_and_back_and_no_connection_notices(
    agent: Parts, exchange: Exchange, pod: Running, tool: str
) -> None:
    empty = agent.kernel.policies()
    under_rules(agent, pod, tool)
    before = rules(pod)
    ruled = open_connections(pod)
    with load(pod):
        assert "Istio's rules are removed" in exchange.take_over("default", "pod")
    assert not has_rules(pod)
    assert agent.enrolments.is_captured(pod.wire.sandbox.cookie)
    assert "ISTIO" not in rules(pod)
    ask(ruled)
    captured = open_connections(pod)
    with load(pod):
        assert "captured by Istio's rules" in exchange.give_back("default", "pod")
    ask(ruled)
    ask(captured)
    assert agent.kernel.policies() == empty
    assert rules(pod) == before
    assert [reason for reason, _ in agent.events.events] == ["CaptureTakenOver", "CaptureGivenBack"]
    assert list((exchange.run_dir / "rules").iterdir()) == []


def test_rules_of_others_stay_in_their_order(agent: Parts, exchange: Exchange, pod: Running) -> None:
    path = pod.wire.pod.path
    run_in(path, ["iptables-nft-restore"], "*nat\n:MINE - [0:0]\n-A OUTPUT -p tcp --dport 7 -j MINE\nCOMMIT\n")
    under = pod.pod(pod.proxy)
    agent.pods.pods = [under]
    for argv, text in texts("iptables-nft", under):
        run_in(path, [*argv, "--noflush"], text)
    run_in(path, ["iptables-nft", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "--dport", "9", "-j", "MINE"])
    before = rules(pod)
    exchange.take_over("default", "pod")
    mine = [line for line in rules(pod).splitlines() if "MINE" in line]
    assert mine == ["-A OUTPUT -p tcp -m tcp --dport 7 -j MINE", "-A OUTPUT -p tcp -m tcp --dport 9 -j MINE"]
    exchange.give_back("default", "pod")
    assert rules(pod) == before


def test_no_query_goes_unanswered_while_captured_dns_is_exchanged(
    agent: Parts, exchange: Exchange, pod: Running
) -> None:
    wire = pod.wire
    resolver(pod.container(pod.proxy), "agent", 15053, "127.0.0.1", "::1", uid=PROXY)
    resolver(wire.peer, "nameserver", 53, "0.0.0.0", "::", uid=0)
    pod.env = ({"name": "ISTIO_META_DNS_CAPTURE", "value": "true"},)
    under_rules(agent, pod)
    ways = [(host, how) for host in (wire.peer.ip4, wire.peer.ip6) for how in ("connected", "unconnected")]
    asking = [wire.pod.start([*PYTHON, QUERIES, str(host), how], 1000) for host, how in ways]
    exchange.take_over("default", "pod")
    exchange.give_back("default", "pod")
    for way, process in zip(ways, asking, strict=True):
        good, bad, count = json.loads(process.communicate("stop\n", timeout=10)[0])
        assert (count, bad) == (0, []), way
        assert good > 10, way


def test_both_captures_at_once_lose_no_connection(agent: Parts, pod: Running) -> None:
    """As when istio-cni's rules come to a pod that is enrolled."""
    under = under_rules(agent, pod)
    with load(pod):
        assert next(agent.adoption.adopt([under], beside_rules=True)).listeners
        agent.enrolments.capture_again(pod.wire.sandbox.cookie)
    ask(open_connections(pod))


@pytest.mark.parametrize(
    ("annotation", "value", "words"),
    [
        ("sidecar.istio.io/interceptionMode", "TPROXY", "TPROXY mode"),
        ("traffic.sidecar.istio.io/includeOutboundIPRanges", "127.0.0.0/8", "loopback range"),
    ],
)
def test_what_sidestep_cannot_take_over_is_refused_before_anything_changes(
    agent: Parts, exchange: Exchange, pod: Running, annotation: str, value: str, words: str
) -> None:
    under_rules(agent, pod, api_pod=pod.pod(pod.proxy, **{annotation: value}))
    before = rules(pod)
    with pytest.raises(NotExchanged, match=words):
        exchange.take_over("default", "pod")
    assert rules(pod) == before
    assert agent.enrolments.cookies() == []


def test_a_pod_keeps_its_rules_if_a_step_fails(
    agent: Parts, exchange: Exchange, pod: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    empty = agent.kernel.policies()
    under_rules(agent, pod)
    before = rules(pod)
    restore = tmp_path / "bin" / "iptables-nft-restore"  # fails at its first call: that which removes the rules
    restore.parent.mkdir()
    real = shutil.which(restore.name)
    restore.write_text(f"#!/bin/sh\nmkdir {tmp_path}/once 2>/dev/null && echo no room >&2 && exit 4\nexec {real} $@\n")
    restore.chmod(0o755)
    monkeypatch.setenv("PATH", f"{restore.parent}:{os.environ['PATH']}")
    with load(pod), pytest.raises(RulesNotChanged, match="iptables-nft-restore --noflush fails: no room"):
        exchange.take_over("default", "pod")
    assert rules(pod) == before
    assert agent.kernel.policies() == empty
    stray = popen(pod.wire.pod.path, None, ["sleep", "60"], 0, 0)
    pod.wire.kernel.procfs.show(stray.pid)
    try:
        with pytest.raises(NotExchanged, match="stray processes"):
            exchange.take_over("default", "pod")
    finally:
        pod.wire.kernel.procfs.hide(stray.pid)
        stray.kill()
        stray.wait()
    assert rules(pod) == before
    assert agent.kernel.policies() == empty


def test_a_pod_whose_proxy_does_not_listen_is_not_taken_over(agent: Parts, exchange: Exchange, wire: Wire) -> None:
    with running(wire) as pod:
        under_rules(agent, pod)
        with pytest.raises(NotExchanged, match="is not seen to listen on 15006"):
            exchange.take_over("default", "pod")
        assert has_rules(pod)
        assert agent.enrolments.cookies() == []


def test_after_a_crash_in_the_middle_both_ways_can_be_gone_again(
    agent: Parts, pod: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise SystemExit("killed")

    exchange = made_exchange(agent, tmp_path)
    under_rules(agent, pod)
    before = rules(pod)
    with monkeypatch.context() as crashing:
        crashing.setattr(exchanges, "take_away", crash)
        crashing.setattr(Exchange, "_undo", lambda *_: None)
        with pytest.raises(SystemExit):
            exchange.take_over("default", "pod")
    again = made_exchange(agent, tmp_path)
    with load(pod):
        again.complete()  # it is captured, and has all its rules: nobody knows whether they are wanted
        assert has_rules(pod)
        again.take_over("default", "pod")
    with monkeypatch.context() as crashing:
        crashing.setattr(Exchange, "_end", crash)
        with pytest.raises(SystemExit):
            again.give_back("default", "pod")
    with load(pod):
        made_exchange(agent, tmp_path).give_back("default", "pod")
    assert rules(pod) == before


def test_rules_are_kept_of_living_pods_alone(agent: Parts, exchange: Exchange, pod: Running) -> None:
    under_rules(agent, pod)
    exchange.take_over("default", "pod")
    assert exchange.taken_over() == ["default/pod"]
    kept = exchange.run_dir / "rules" / f"{pod.wire.sandbox.cookie}.json"
    kept.rename(kept.with_stem("1"))  # of a namespace that is gone: cookies are not used again
    assert exchange.taken_over() == []
    assert list(kept.parent.iterdir()) == []
    with pytest.raises(NotExchanged, match="was not taken over"):
        exchange.give_back("default", "pod")


def test_a_pod_without_istios_rules_has_nothing_to_exchange(agent: Parts, exchange: Exchange, pod: Running) -> None:
    agent.pods.pods = [pod.pod(pod.proxy)]
    with pytest.raises(NotExchanged, match="there is nothing to take over"):
        exchange.take_over("default", "pod")


def test_a_shadow_pod_is_taken_over_too(agent: Parts, exchange: Exchange, pod: Running) -> None:
    under = under_rules(agent, pod)
    assert next(agent.adoption.adopt([under], beside_rules=True)).listeners
    with load(pod):
        exchange.take_over("default", "pod")
    ask(open_connections(pod))
    assert not has_rules(pod)


def test_a_refused_takeover_disturbs_no_connection(agent: Parts, exchange: Exchange, wire: Wire) -> None:
    """The rules redirect to whoever listens. sidestep would not: this is not the user whom the Pod names."""
    wire.peer.serve("remote", "8080", uid=0)
    with running(wire) as pod:
        pod.serve("outbound", "15001", uid=PROXY)
        pod.serve("inbound", "15006", uid=2000)
        wire.pod.serve("app", "8080")
        under_rules(agent, pod)
        before, empty = rules(pod), agent.kernel.policies()
        with load(pod), pytest.raises(NotExchanged, match="is not seen to listen on 15006"):
            exchange.take_over("default", "pod")
        assert rules(pod) == before
        assert agent.kernel.policies() == empty


@pytest.mark.parametrize("tool", TOOLS)
def test_to_ask_again_changes_nothing(agent: Parts, exchange: Exchange, pod: Running, tool: str) -> None:
    under_rules(agent, pod, tool)
    before = rules(pod)
    exchange.take_over("default", "pod")
    assert exchange.take_over("default", "pod") == "captured by sidestep already, without rules of Istio's"
    exchange.give_back("default", "pod")
    assert rules(pod) == before
    assert has_rules(pod)


@pytest.mark.parametrize("tool", ["iptables-nft", "ip6tables-nft"])
def test_an_agent_completes_what_another_one_has_left_in_the_middle(
    agent: Parts, exchange: Exchange, pod: Running, tool: str
) -> None:
    """Killed between the two families, it has left one of them."""
    under_rules(agent, pod)
    before = rules(pod)
    exchange.take_over("default", "pod")
    kept = next((exchange.run_dir / "rules").glob("*.json"))
    part = next(text for argv, text in texts("iptables-nft", agent.pods.pods[0]) if argv[0].startswith(tool))
    run_in(pod.wire.pod.path, [f"{tool}-restore", "--noflush"], part)
    exchange.complete()
    assert not has_rules(pod)  # it is captured
    assert kept.exists()
    run_in(pod.wire.pod.path, [f"{tool}-restore", "--noflush"], part)
    agent.enrolments.remove(pod.wire.sandbox.cookie)
    exchange.complete()
    found = [line for line in rules(pod).splitlines() if "SIDESTEP_TRACKING" not in line]
    assert found == before.splitlines()  # it was not
    assert not kept.exists()


def test_a_client_that_waits_for_its_connection_meanwhile_reaches_the_proxy(
    agent: Parts, exchange: Exchange, wire: Wire
) -> None:
    """Its first SYN came without rules, found no room, and conntrack remembers what was decided about it."""
    with running(wire) as pod:
        busy = pod.container(pod.proxy).start([*PYTHON, BUSY], PROXY)
        wire.pod.serve("app", "8080")
        under_rules(agent, pod)
        exchange.take_over("default", "pod")
        clients = [wire.peer.start([*PYTHON, PATIENT, str(wire.pod.ip4)], 1000) for _ in range(5)]
        exchange.give_back("default", "pod")
        assert busy.stdin is not None
        busy.stdin.write("go\n")
        busy.stdin.flush()
        assert [client.communicate(timeout=20)[0] for client in clients] == ["inbound\n"] * 5


def test_a_pod_without_rules_is_not_called_captured_if_its_proxy_has_gone(
    agent: Parts, exchange: Exchange, wire: Wire
) -> None:
    with running(wire) as pod:
        pod.serve("outbound", "15001", uid=PROXY)
        inbound = pod.serve("inbound", "15006", uid=PROXY)
        under_rules(agent, pod)
        exchange.take_over("default", "pod")
        pod.container(pod.proxy).end(inbound)
        with pytest.raises(NotExchanged, match="is not seen to listen on 15006"):
            exchange.take_over("default", "pod")
