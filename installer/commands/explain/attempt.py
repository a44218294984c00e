"""`sidestep explain --try`: makes the connection, and compares what happened with the explanation."""

import errno
import socket
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from bpf.errors import KernelRefused
from bpf.layout import SPREAD6, TOTALS, Cookie, Event, EventKind
from bpf.pins import Pins
from bpf.tables import Tables
from bpf.tracing import Trace, TraceBusy
from cni.enrolment.strays import PodProcesses, processes_of
from cni.netns.namespaces import why_absent
from cni.netns.proc_net import endpoint, family_of, plain
from cni.policy.decision import Action, Inbound, IPAddress, Outbound
from installer.commands.explain.connecting import Attempted, CannotTry, Dial, dial
from installer.commands.explain.explainer import Explanation, routed
from installer.commands.pods.enrolled_pods import EnrolledPod, every
from installer.commands.pods.namespace import NamespaceView, looked_into
from installer.commands.pods.policy_words import LISTENERS

# counter (bpf/layout.py, TOTALS) → the verdict that moves it
_OUTBOUND: dict[tuple[str, str], Action] = {
    ("outbound", "direct"): "pass",
    ("outbound", "captured"): "proxy-outbound",
    ("self", "captured"): "proxy-inbound",
    ("dns", "captured"): "dns",
    ("outbound", "refused"): "refuse",
    ("outbound", "denied"): "refuse",
    ("outbound", "unreachable"): "unreachable",
}
_INBOUND: dict[tuple[str, str], Action] = {
    ("inbound", "direct"): "pass",
    ("inbound", "captured"): "proxy-inbound",
    ("inbound", "refused"): "proxy-inbound",
    ("inbound", "denied"): "refuse",
}
# verdict → what happened, in words
_WORDS: dict[Action, str] = {
    "pass": "directly",
    "refuse": "nowhere: it was refused",
    "unreachable": "nowhere: there is no route",
    **{k: f"to {v[0]}" for k, v in LISTENERS.items()},
}


_EVENT_SECONDS = 0.05  # to wait for an event
Counts = dict[tuple[str, str], int]


@dataclass(frozen=True)
class Happened:
    """What was seen, the verdicts that fit it, and any other fault."""

    seen: Attempted
    fits: frozenset[Action]
    wrong: str = ""


def tried(
    pins: Pins,
    proc: Path,
    tables: Tables,
    pod: EnrolledPod,
    found: Explanation,
    inside: NamespaceView | None,
    interface: str | None,
) -> dict[str, Any]:
    """The document about the attempt. The socket is bound to `interface`, if given. Raises CannotTry."""
    trial = _Trial(pins, proc, tables)
    if isinstance(found.asked, Outbound):
        happened = trial.outbound(pod, found.asked, inside, interface)
    else:
        happened = trial.inbound(pod, found.asked)
    expected, seen = found.verdict.action, happened.seen
    fits = sorted(_WORDS[each] for each in happened.fits)
    differs = happened.wrong if expected in happened.fits else f"it went {' or '.join(fits) or 'nowhere'}"
    dialled = f", the kernel dialled {endpoint(*seen.dialled)}" if seen.dialled else ""
    return {
        "agrees": not differs,
        "differs": differs,
        "happened": f"{seen.words}{dialled}; {' or '.join(fits)}",
        "error": errno.errorcode.get(seen.error) if seen.error else None,
        **{name: endpoint(*end) if (end := getattr(seen, name)) else None for name in ("dialled", "peer", "local")},
    }


class _Trial:
    """Makes one connection of a pod or to a pod, and finds its verdict."""

    def __init__(self, pins: Pins, proc: Path, tables: Tables) -> None:
        self._pins, self._proc, self._tables = pins, proc, tables

    def outbound(
        self, pod: EnrolledPod, asked: Outbound, inside: NamespaceView | None, interface: str | None
    ) -> Happened:
        """Connect from inside the pod."""
        if inside is None:
            raise CannotTry(f"{pod.identity}: {why_absent(self._proc)}")
        wanted = Dial(
            asked.destination,
            asked.port,
            asked.protocol,
            asked.uid,
            asked.gid,
            asked.source,
            asked.mark,
            interface,
        )
        cgroup = self._cgroup(pod, asked.container)
        before = self._tallies(pod)
        seen = dial(wanted, inside.netns_fd, cgroup)
        counted = _moved(_OUTBOUND, before, self._tallies(pod))
        fits = _fitting(asked, seen, frozenset(counted))
        if sum(counted.values()) > 1 and len(fits) > 1:
            raise _too_busy(pod)
        return Happened(seen, fits, _wrong_peer(asked, seen))

    def inbound(self, pod: EnrolledPod, asked: Inbound) -> Happened:
        """Connect from the place that has the source address: another enrolled pod, or our own namespace."""
        if asked.source in pod.addresses:
            raise CannotTry(f"{asked.source} is an address of {pod.identity} itself; give DEST instead of --inbound")
        to = asked.destination or _address_of(pod, asked.source)
        with ExitStack() as stack:
            netns_fd, cgroup, ids = self._place(asked.source, stack)
            wanted = Dial(to, asked.port, asked.protocol, *ids, asked.source)
            before = self._tallies(pod)
            seen, told = self._told(pod, wanted, lambda: dial(wanted, netns_fd, cgroup))
            counted = _moved(_INBOUND, before, self._tallies(pod))
        if told:
            return told
        # no trace, or the source was rewritten on the way: the counters have to tell
        if sum(counted.values()) > 1:
            raise _too_busy(pod)
        return Happened(seen, frozenset(counted or ("pass",)))

    def _place(self, source: IPAddress, stack: ExitStack) -> tuple[int | None, Path | None, tuple[int, int]]:
        """The namespace, cgroup and user to connect from. In a pod they are the proxy's, whose connections pass."""
        owners = [each for each in every(self._pins, self._tables) if plain(source) in each.addresses]
        if len(owners) > 1:
            names = ", ".join(str(each.identity) for each in owners)
            raise CannotTry(f"{source} is an address of {names}; which pod is meant is unknown")
        if not owners:
            _require_own(source)
            return None, None, (0, 0)
        pod = owners[0]
        inside = stack.enter_context(looked_into(pod, self._proc))
        if inside is None:
            raise CannotTry(f"{pod.identity}, which has {source}: {why_absent(self._proc)}")
        return inside.netns_fd, self._cgroup(pod, "trusted"), (pod.entry.proxy_uid, pod.entry.proxy_gid)

    def _told(self, pod: EnrolledPod, wanted: Dial, work: Callable[[], Attempted]) -> tuple[Attempted, Happened | None]:
        """Make the connection. Also what the programs' events say about just this one: None if they cannot tell.

        Some connections pass without an event, so no event means "passed". But if an event with the same destination
        came from elsewhere meanwhile, it may be ours with a rewritten source: then the events cannot tell.
        """
        with ExitStack() as stack:
            try:
                trace = stack.enter_context(Trace(self._pins, pod.cookie))
                trace.poll(0)
            except (TraceBusy, KernelRefused):
                return work(), None
            seen = work()
            arrived = [Event.from_buffer_copy(raw) for raw in trace.poll(_EVENT_SECONDS)]
            has_all = not trace.lost
        arrived = [each for each in arrived if each.kind == EventKind.INBOUND]
        for each in arrived:
            if (str(each.source.ip()), each.source_port) == seen.local:
                return seen, Happened(seen, frozenset((_INBOUND[TOTALS[each.verdict]],)))
        there = wanted.destination, wanted.port
        if has_all and not any((each.destination.ip(), each.destination_port) == there for each in arrived):
            return seen, Happened(seen, frozenset(("pass",)))
        return seen, None

    def _tallies(self, pod: EnrolledPod) -> Counts:
        tally = self._tables.tallies.get(Cookie(pod.cookie))
        return dict(zip(TOTALS, tally.connections if tally else [0] * len(TOTALS), strict=True))

    def _cgroup(self, pod: EnrolledPod, container: str) -> Path:
        """A cgroup of the pod where the programs see us; in a strict pod the proxy's or another, by `container`.

        If they see none of the pod's processes, it is the cgroup of another.
        """
        processes = processes_of(self._pins, [pod.cookie], self._proc)[pod.cookie]
        is_proxys = {"trusted": True, "other": False}.get(container) if pod.proxy_cgroup is not None else None
        for each in processes.inside or processes.found:
            if is_proxys is None or (pod.proxy_cgroup in each.cgroup.lineage) == is_proxys:
                return each.cgroup.directory
        raise CannotTry(
            f"{pod.identity} has no process in whose cgroup the connection could be made{_because(processes)}"
        )


def _moved(actions: Mapping[tuple[str, str], Action], before: Counts, after: Counts) -> dict[Action, int]:
    """The verdicts that the pod's connections had in between, with how many had each. Ours is one of them."""
    found: dict[Action, int] = {}
    for name, action in actions.items():
        if more := after[name] - before[name]:
            found[action] = found.get(action, 0) + more
    return found


def _because(processes: PodProcesses) -> str:
    return f": {processes.words}" if processes.words else ""


def _too_busy(pod: EnrolledPod) -> CannotTry:
    return CannotTry(
        f"{pod.identity} has too many connections at the moment to tell which one was ours; try again, or watch "
        f"`sidestep trace {pod.identity}`"
    )


def _fitting(asked: Outbound, seen: Attempted, counted: frozenset[Action]) -> frozenset[Action]:
    """The verdicts that fit. The socket tells more than the counters, which count all of the pod's connections."""
    if seen.error == errno.EPERM and seen.dialled is None:
        return counted & {"refuse", "unreachable"} or frozenset(("refuse",))
    if seen.dialled is None:
        return counted or frozenset(("pass",))
    to, port = ip_address(seen.dialled[0]), seen.dialled[1]
    possible: set[Action] = {action for action, (_, each) in LISTENERS.items() if port == each and _is_near(asked, to)}
    if (to, port) == (routed(asked), asked.port):
        possible.add("pass")
    return frozenset(possible & counted or possible)


def _is_near(asked: Outbound, ip: IPAddress) -> bool:
    """Whether the pod's proxy can listen at this address."""
    return ip.is_loopback or ip in SPREAD6 or ip in asked.own_addresses


def _wrong_peer(asked: Outbound, seen: Attempted) -> str:
    """The fault of getpeername(), "" for none. Even a captured connection must show its original destination."""
    if seen.peer is None:
        return ""
    # bpf_sock_addr has no zone to write, so the zone of a captured link-local destination is not shown
    address, port = seen.peer
    if (address.partition("%")[0], port) == (str(routed(asked)).partition("%")[0], asked.port):
        return ""
    return f"getpeername() says {endpoint(*seen.peer)}"


def _address_of(pod: EnrolledPod, source: IPAddress) -> IPAddress:
    """An address of the pod, of the same family as `source`."""
    entry = pod.entry
    ip: IPAddress = (entry.source4 if plain(source).version == 4 else entry.source6).ip()
    if ip.version != plain(source).version or ip.is_unspecified:
        raise CannotTry(f"{pod.identity} has no IPv{plain(source).version} address; give --to ADDRESS")
    return ip


def _require_own(source: IPAddress) -> None:
    with socket.socket(family_of(source)) as probe:
        try:
            probe.bind((str(source), 0))
        except OSError as error:
            raise CannotTry(
                f"{source} belongs to no enrolled pod and not to this machine: nobody here can connect from it"
            ) from error
