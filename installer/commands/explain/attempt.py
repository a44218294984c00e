"""`sidestep explain --try`: make the connection, and hold what happened against what was explained."""

import errno
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from bpf.errors import KernelRefused
from bpf.kernel import cgroup2_root
from bpf.layout import SPREAD6, TOTALS, BuildEntry, Cookie, Event, EventKind, Word
from bpf.pins import Pins
from bpf.tables import Table, Tables
from bpf.tracing import Trace, TraceBusy
from cni.netns.namespaces import why_absent
from cni.netns.proc_net import endpoint, family_of, plain
from cni.netns.processes import GONE, Crowd, crowds
from cni.policy.decision import Action, Inbound, IPAddress, Outbound
from installer.commands.explain.connecting import Attempted, CannotTry, Dial, dial
from installer.commands.explain.explainer import Explanation, routed
from installer.commands.pods.enrolled_pods import EnrolledPod, every
from installer.commands.pods.namespace import NamespaceView, looked_into
from installer.commands.pods.policy_words import LISTENERS

# the counter that each verdict moves (bpf/layout.py, TOTALS)
_OUTBOUND: dict[tuple[str, str], Action] = {
    ("outbound", "direct"): "pass",
    ("outbound", "captured"): "proxy-outbound",
    ("self", "captured"): "proxy-inbound",
    ("dns", "captured"): "dns",
    ("outbound", "refused"): "refuse",
    ("outbound", "denied"): "refuse",
}
_INBOUND: dict[tuple[str, str], Action] = {
    ("inbound", "direct"): "pass",
    ("inbound", "captured"): "proxy-inbound",
    ("inbound", "refused"): "proxy-inbound",
    ("inbound", "denied"): "refuse",
}
# what has happened, in words
_WORDS: dict[Action, str] = {
    "pass": "directly",
    "refuse": "nowhere: it was refused",
    **{k: f"to {v[0]}" for k, v in LISTENERS.items()},
}


_EVENT_SECONDS = 0.05  # until an event can be read
_ATTEMPTS = 20


@dataclass(frozen=True)
class Happened:
    """What was seen, which verdicts it fits, and what else was not as it should be."""

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
    """What is printed of it; `interface` is what the socket is bound to, if anything. Raises CannotTry."""
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
    """Where connections are made from."""

    def __init__(self, pins: Pins, proc: Path, tables: Tables) -> None:
        self._pins, self._proc, self._tables = pins, proc, tables

    def outbound(
        self, pod: EnrolledPod, asked: Outbound, inside: NamespaceView | None, interface: str | None
    ) -> Happened:
        """From the pod, as it was asked."""
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
        seen, counted = self._counted(pod, _OUTBOUND, lambda: dial(wanted, inside.netns_fd, cgroup))
        fits = _fitting(asked, seen, frozenset(counted))
        if len(counted) > 1 and len(fits) > 1:
            raise _too_busy(pod)
        return Happened(seen, fits, _wrong_peer(asked, seen))

    def inbound(self, pod: EnrolledPod, asked: Inbound) -> Happened:
        """From wherever on this node its source is: another enrolled pod, or the namespace that we are in."""
        if asked.source in pod.addresses:
            raise CannotTry(f"{asked.source} is {pod.identity}'s own; give {pod.identity} a DEST without --inbound")
        to = asked.destination or _address_of(pod, asked.source)
        with ExitStack() as stack:
            netns_fd, cgroup, ids = self._place(asked.source, stack)
            wanted = Dial(to, asked.port, asked.protocol, *ids, asked.source)
            if told := self._told(pod, wanted, lambda: dial(wanted, netns_fd, cgroup)):
                return told
            # where somebody else traces, or has rewritten the source
            seen, counted = self._counted(pod, _INBOUND, lambda: dial(wanted, netns_fd, cgroup))
        if len(counted) > 1:
            raise _too_busy(pod)
        return Happened(seen, frozenset(counted or ("pass",)))

    def _place(self, source: IPAddress, stack: ExitStack) -> tuple[int | None, Path | None, tuple[int, int]]:
        """Namespace, cgroup and user to connect as: a pod's proxy, whose connections nobody captures."""
        owners = [each for each in every(self._pins, self._tables) if plain(source) in each.addresses]
        if len(owners) > 1:
            names = ", ".join(str(each.identity) for each in owners)
            raise CannotTry(f"{source} is an address of {names}; which of them is meant can't be told")
        if not owners:
            _require_own(source)
            return None, None, (0, 0)
        pod = owners[0]
        inside = stack.enter_context(looked_into(pod, self._proc))
        if inside is None:
            raise CannotTry(f"{pod.identity}, which has {source}: {why_absent(self._proc)}")
        return inside.netns_fd, self._cgroup(pod, "trusted"), (pod.entry.proxy_uid, pod.entry.proxy_gid)

    def _told(self, pod: EnrolledPod, wanted: Dial, work: Callable[[], Attempted]) -> Happened | None:
        """What the programs say of just this connection; None where that is not to be known, or somebody else listens.

        They say nothing of what passes uncounted. But what arrived there meanwhile from elsewhere may be ours as well.
        """
        with ExitStack() as stack:
            try:
                trace = stack.enter_context(Trace(self._pins, pod.cookie))
                trace.poll(0)
            except (TraceBusy, KernelRefused):
                return None
            seen = work()
            arrived = [Event.from_buffer_copy(raw) for raw in trace.poll(_EVENT_SECONDS)]
            has_all = not trace.lost
        arrived = [each for each in arrived if each.kind == EventKind.INBOUND]
        for each in arrived:
            if (str(each.source.ip()), each.source_port) == seen.local:
                return Happened(seen, frozenset((_INBOUND[TOTALS[each.verdict]],)))
        there = wanted.destination, wanted.port
        if has_all and not any((each.destination.ip(), each.destination_port) == there for each in arrived):
            return Happened(seen, frozenset(("pass",)))
        return None

    def _counted(
        self, pod: EnrolledPod, actions: Mapping[tuple[str, str], Action], work: Callable[[], Attempted]
    ) -> tuple[Attempted, set[Action]]:
        """And what that has counted as, one of them if the pod has a quiet moment: its other connections count too."""
        left: set[Action] | None = None
        for _ in range(_ATTEMPTS):
            before = self._tallies(pod)
            seen = work()
            after = self._tallies(pod)
            moved = {action for name, action in actions.items() if after[name] > before[name]}
            left = moved if left is None else left & moved  # ours is among them each time
            if len(left) < 2:
                break
        return seen, left or set()

    def _tallies(self, pod: EnrolledPod) -> dict[tuple[str, str], int]:
        tally = self._tables.tallies.get(Cookie(pod.cookie))
        return dict(zip(TOTALS, tally.connections if tally else [0] * len(TOTALS), strict=True))

    def _cgroup(self, pod: EnrolledPod, container: str) -> Path:
        """A cgroup of the pod's processes in which the programs see us; in strict pods the one it should be in."""
        top = _attached_at(self._pins)
        crowd = crowds(self._proc).get(pod.inode)
        is_proxys = {"trusted": True, "other": False}.get(container) if pod.proxy_cgroup is not None else None
        for directory in _cgroups(self._proc, crowd, top) if crowd else ():
            if is_proxys is None or (directory.stat().st_ino == pod.proxy_cgroup) == is_proxys:
                return directory
        raise CannotTry(f"{pod.identity} has no process in a cgroup below {top}, where the programs are attached")


def _too_busy(pod: EnrolledPod) -> CannotTry:
    return CannotTry(
        f"{pod.identity} has too many connections at the moment to tell which of them was ours; try again, or see what "
        f"`sidestep trace {pod.identity}` says"
    )


def _fitting(asked: Outbound, seen: Attempted, counted: frozenset[Action]) -> frozenset[Action]:
    """The verdicts that this could be. The counters are all the pod's, so they only help where the socket is silent."""
    if seen.error in (errno.EPERM, errno.EACCES) and seen.dialled is None:
        return frozenset(("refuse",))
    if seen.dialled is None:
        return counted or frozenset(("pass",))
    to, port = ip_address(seen.dialled[0]), seen.dialled[1]
    possible: set[Action] = {action for action, (_, each) in LISTENERS.items() if port == each and _is_near(asked, to)}
    if (to, port) == (routed(asked), asked.port):
        possible.add("pass")
    return frozenset(possible & counted or possible)


def _is_near(asked: Outbound, ip: IPAddress) -> bool:
    """Whether it is one of those where the pod's proxy listens."""
    return ip.is_loopback or ip in SPREAD6 or ip in asked.own_addresses


def _wrong_peer(asked: Outbound, seen: Attempted) -> str:
    """A captured connection must look as if it had gone where it was meant to."""
    meant = str(routed(asked)), asked.port
    if seen.peer is None or seen.peer == meant:
        return ""
    return f"getpeername() says {endpoint(*seen.peer)}"


def _address_of(pod: EnrolledPod, source: IPAddress) -> IPAddress:
    """One of the pod's, of the family that its connections have."""
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
                f"{source} is neither an enrolled pod's nor this machine's: nobody here can connect from it"
            ) from error


def _attached_at(pins: Pins) -> Path:
    table: Table[Word, BuildEntry] = Table(pins.look_only(), "build")
    try:
        build = table.get(Word(0))
    finally:
        os.close(table.descriptor)
    recorded = Path(build.cgroup.decode()) if build else cgroup2_root()
    return recorded if recorded.is_dir() else cgroup2_root()


def _cgroups(proc: Path, crowd: Crowd, top: Path) -> Iterator[Path]:
    """The cgroup2 directories of a crowd's processes that are below `top`, each once."""
    seen = set()
    for pid in crowd.pids:
        try:
            lines = (proc / str(pid) / "cgroup").read_text().splitlines()
        except GONE:
            continue
        path = next((line[3:] for line in lines if line.startswith("0::")), "")
        if path and path not in seen:
            seen.add(path)
            directory = _directory(path, top)
            if directory is not None:
                yield directory


def _directory(path: str, top: Path) -> Path | None:
    """Where a cgroup's directory is; seen from a cgroup namespace the path starts elsewhere, so then by its name."""
    plainly = cgroup2_root() / path.lstrip("/")
    if ".." not in plainly.parts and plainly.is_dir():
        return plainly if plainly.is_relative_to(top) else None
    name = Path(path).name
    return next((Path(at) / name for at, below, _ in os.walk(top) if name in below), None)
