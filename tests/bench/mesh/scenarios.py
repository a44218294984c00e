"""The ways a connection can get from one pod to the other that are compared, each with a pair of pods of its own.

Every way has its own node as well: nothing of sidestep is attached or running where it would only be in the way, and
the level of acceleration is the whole node's, as an operator would set it.
"""

import os
import resource
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from bpf.attachment import detach_programs
from bpf.layout import Level
from bpf.pins import Pins
from cni.policy.annotations import ACCELERATION
from installer.commands.status.status_document import status_of
from tests.bench.mesh.chained import ChainedEnvoy, loopback, pipe
from tests.bench.mesh.proxies import SERVICES, InterceptingEnvoy
from tests.bench.mesh.servers import Servers
from tests.conformance.capture import by_rules
from tests.conformance.configs import Config
from tests.conformance.istio_plugin import Tools, by_istio
from tests.lab.envoy import Envoy
from tests.lab.levels import wait_for_level
from tests.lab.machine import acceleration_needed
from tests.lab.node import Node
from tests.lab.pod import Pod

FILES = 20_000  # open files of a process: thousands of idle connections through one Envoy
_SOURCE = Path(__file__).with_name("unixway.c")


class Way(StrEnum):
    """Who gets connections to the Envoys."""

    NOBODY = "nobody"  # there are no Envoys
    IPTABLES = "iptables"
    NFTABLES = "nftables"  # by Istio's own plugin, which writes native nftables rules
    SIDESTEP = "sidestep"
    UNIX = "unix"  # Envoys chained by their configuration


@dataclass(frozen=True)
class Scenario:
    """One thing that is compared."""

    name: str
    way: Way
    level: Level | None = None  # of acceleration


BASELINE = Scenario("iptables", Way.IPTABLES)
SCENARIOS = {
    each.name: each
    for each in (
        Scenario("no-mesh", Way.NOBODY),
        BASELINE,
        Scenario("nftables", Way.NFTABLES),
        Scenario("off", Way.SIDESTEP, Level.OFF),
        Scenario("proxy", Way.SIDESTEP, Level.PROXY),
        Scenario("full", Way.SIDESTEP, Level.FULL),
        Scenario("unix", Way.UNIX),
    )
}


@dataclass(frozen=True)
class Pair:
    """A client's pod and a server's, with everything running that one needs."""

    scenario: Scenario
    client: Pod
    server: Pod
    envoys: tuple[Envoy, ...]  # the server's, then the client's
    files: Path  # of the unix sockets, and whatever the load generators write
    preload: Path

    @property
    def host(self) -> str:
        """Where the client finds the services."""
        return "127.0.0.1" if self.scenario.way is Way.UNIX else str(self.server.ip4)

    def way_in(self, service: str) -> Path | None:
        """The unix socket that is the client's end of a service; None where it is reached over IPv4."""
        has_none = self.scenario.way is not Way.UNIX or SERVICES[service].speaks == "bytes"
        return None if has_none else self.files / f"client-{service}.sock"

    def has_shaken_hands(self, service: str) -> bool:
        """Whether the client's Envoy speaks mTLS to the server's, where it should."""
        if not self.envoys or not SERVICES[service].is_mutual:
            return True
        return self.envoys[-1].handshakes(SERVICES[service].port) > 0

    def traffic(self) -> dict[str, int]:
        """What became of the messages of both pods, as `sidestep status` has it; nothing without sidestep."""
        if self.scenario.way is not Way.SIDESTEP:
            return {}
        pods = [each["acceleration"] for each in status_of(Pins(self.client.node.bpffs))["pods"]]
        return {key: sum(each[key] for each in pods) for key in pods[0] if key != "level"}

    def environment(self, service: str) -> dict[str, str] | None:
        """What makes a load generator use it; None for the parent's environment."""
        way = self.way_in(service)
        return None if way is None else {**os.environ, "LD_PRELOAD": str(self.preload), "UNIX_WAY": str(way)}


@contextmanager
def pairs(scenarios: Sequence[Scenario]) -> Iterator[dict[str, Pair]]:
    """All of them at once, by name; idle ones cost nothing. Taken down on leaving."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    with acceleration_needed(), ExitStack() as stack:
        yield {each.name: _pair(stack, each) for each in scenarios}


def bare_pods(stack: ExitStack, scenario: Scenario) -> tuple[Pod, Pod]:
    """A client's and a server's pod, captured, with nothing running in them."""
    node = stack.enter_context(_node(scenario))
    return _pod(stack, node, scenario, "client"), _pod(stack, node, scenario, "server")


def _pair(stack: ExitStack, scenario: Scenario) -> Pair:
    client, server = bare_pods(stack, scenario)
    node = client.node
    files = node.directory / "files"
    files.mkdir()
    files.chmod(0o1777)
    preload = files / "unixway.so"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", preload, _SOURCE, "-ldl"], check=True)
    servers = Servers(server, files, scenario.way is Way.UNIX)
    servers.start()
    envoys = _envoys(scenario, client, server, servers)
    for envoy in envoys:
        envoy.start()
    return Pair(scenario, client, server, envoys, files, preload)


@contextmanager
def _node(scenario: Scenario) -> Iterator[Node]:
    """With the agent and its programs only where they capture."""
    node = Node()
    node.agent.options += ["--acceleration", str(scenario.level or Level.OFF)]
    node.is_chained = scenario.way is Way.SIDESTEP
    with node:
        if not node.is_chained:
            node.agent.terminate()
            detach_programs(Pins(node.bpffs))
        if scenario.level is not None:
            wait_for_level(node, str(scenario.level))
        yield node


def _pod(stack: ExitStack, node: Node, scenario: Scenario, name: str) -> Pod:
    annotations = {} if scenario.level is None else {ACCELERATION: str(scenario.level)}
    pod = node.pod(name, mesh=scenario.way is Way.SIDESTEP, annotations=annotations, app=False, envoy=False)
    if scenario.way is Way.IPTABLES:
        by_rules(stack, Config("default"), pod.netns)
    if scenario.way is Way.NFTABLES:
        stack.enter_context(by_istio(Tools.NFTABLES))(stack, Config("default"), pod.netns)
    return pod


def _envoys(scenario: Scenario, client: Pod, server: Pod, servers: Servers) -> tuple[Envoy, ...]:
    if scenario.way is Way.NOBODY:
        return ()
    if scenario.way is not Way.UNIX:
        return InterceptingEnvoy(server, server), InterceptingEnvoy(client, server)
    files = servers.files
    at_client, at_server = {}, {}
    for name, service in SERVICES.items():
        middle = pipe(files / f"middle-{name}.sock")
        is_stream = service.speaks == "bytes"  # iperf3 has no unix sockets
        entry = loopback(service.port) if is_stream else pipe(files / f"client-{name}.sock")
        at_client[name] = entry, middle
        at_server[name] = middle, loopback(service.port) if is_stream else pipe(servers.socket(name))
    return ChainedEnvoy(server, at_server, is_server=True), ChainedEnvoy(client, at_client, is_server=False)
