"""Examines other programs on our hooks: they may keep ours out, run before ours, or do no harm."""

from dataclasses import dataclass
from pathlib import Path

from bpf.errors import KernelRefused
from bpf.foreign import Foreign, Mode, find_foreign
from installer.probe.findings import Finding, Presence

_WHAT, _NEEDED_BY = "other programs", "attaching; seeing Services' addresses"


@dataclass(frozen=True)
class _Balancer:
    """A socket load-balancer: when an application connects to a Service, it replaces the address by a pod's."""

    name: str
    prefixes: tuple[str, ...]  # of the names of its programs
    hostless: str  # the setting that makes it leave pods alone


_BALANCERS = (
    _Balancer("Cilium's socket load-balancer", ("cil_sock", "sock4_", "sock6_"), "socketLB.hostNamespaceOnly=true"),
    _Balancer("Calico's connect-time load-balancer", ("calico_", "cali_"), "bpfConnectTimeLoadBalancing=Disabled"),
)


def other_programs(places: list[Path]) -> list[Finding]:
    """A row for each owner of other programs and each cgroup, at and above the places to attach at; one if none."""
    try:
        rows = [row for place in places for row in _rows_at(place)]
    except (KernelRefused, OSError) as error:
        return [Finding(_WHAT, _NEEDED_BY, f"not examined: {error}", Presence.UNKNOWN, "see the other rows")]
    return list(dict.fromkeys(rows)) or [Finding(_WHAT, _NEEDED_BY, "none", Presence.YES)] * bool(places)


def _rows_at(point: Path) -> list[Finding]:
    """The rows about one place. Raises KernelRefused, OSError."""
    found = find_foreign(point)
    groups: dict[tuple[Path, Mode, bool, str], list[Foreign]] = {}
    for each in found:
        balancer = _balancer_of(each)
        groups.setdefault((each.cgroup, each.mode, each.first, balancer.name if balancer else ""), []).append(each)
    return [_row(members, point) for members in groups.values()]


def _balancer_of(each: Foreign) -> _Balancer | None:
    for balancer in _BALANCERS:
        if any(name.startswith(balancer.prefixes) for name in each.names):
            return balancer
    return None


def _row(members: list[Foreign], point: Path) -> Finding:
    first = members[0]
    names = ", ".join(dict.fromkeys(name for each in members for name in each.names))
    hooks = ", ".join(each.hook for each in members)
    balancer = _balancer_of(first)
    found = f"{balancer.name if balancer else names} at {first.cgroup} ({hooks})"
    verdict, remark, advice = _judge(first, balancer, point, hooks)
    return Finding(_WHAT, _NEEDED_BY, f"{found}, {remark}", verdict, advice)


def _judge(first: Foreign, balancer: _Balancer | None, point: Path, hooks: str) -> tuple[Presence, str, str]:
    """The verdict, its meaning, and what to do."""
    inside = first.cgroup == point
    if first.mode is Mode.EXCLUSIVE or (inside and first.mode is Mode.OVERRIDE):
        owner = f"have {balancer.name} attach" if balancer else "have its owner attach it"
        return (
            Presence.NO,
            "attached exclusively: ours can't be attached",
            f"{owner} with BPF_F_ALLOW_MULTI, or detach it",
        )
    if first.mode is Mode.OVERRIDE:
        return Presence.WARNING, "replaced by ours at our cgroup", "have its owner attach it with BPF_F_ALLOW_MULTI"
    if not inside:
        return Presence.YES, "runs after ours", ""
    if balancer and first.first:
        advice = f"set {balancer.hostless}, or --cgroup to a cgroup below that holds the pods"
        return Presence.WARNING, "runs before ours: Services' addresses are hidden from us", advice
    return Presence.YES, "runs beside ours", ""
