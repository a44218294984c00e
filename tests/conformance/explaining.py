"""What `sidestep explain` says of the probes, asked of the maps while the pod is enrolled."""

from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path

from bpf.pins import Pins
from bpf.tables import Tables
from cni.policy.decision import Action, Verdict
from installer.commands.explain.explainer import Asker, Explainer
from installer.commands.pods.enrolled_pods import find_pod
from installer.commands.pods.namespace import looked_into
from tests.conformance.compare import UNREACHABLE
from tests.conformance.kinds import Probe
from tests.conformance.world import Seen

Verdicts = list[Verdict]  # one for each destination
# who answers → what has become of it; anybody else has got it directly
_CAPTURED: dict[str, Action] = {"E1": "proxy-outbound", "E6": "proxy-inbound", "D": "dns"}
_PORTS = {"E1": 15001, "E6": 15006, "D": 15053}
# whom a probe from outside comes from, by place and family
_OUTSIDE = {
    ("peer", 4): "10.20.0.1",
    ("peer", 6): "fd20::1",
    ("beyond", 4): "10.21.0.1",
    ("beyond", 6): "fd21::1",
}


def explained(pins: Pins, name: str, probes: Iterable[Probe]) -> list[Verdicts]:
    """The verdicts of each probe of the enrolled pod of that name, in order."""
    with Tables(pins) as tables:
        pod = find_pod(pins, tables, f"default/{name}")
        with looked_into(pod, Path("/proc")) as inside:
            assert inside is not None
            explainer = Explainer(pod, tables, inside.interfaces)
            return [[_explain(explainer, probe, *each) for each in probe.destinations] for probe in probes]


def _explain(explainer: Explainer, probe: Probe, address: str, port: int) -> Verdict:
    destination = ip_address(address)
    if probe.place != "pod":
        sender = ip_address(_OUTSIDE[probe.place, destination.version])
        return explainer.inbound(sender, port, destination, probe.protocol).verdict
    source = ip_address(probe.source) if probe.source else None
    by = Asker(*probe.opener)
    found = explainer.outbound(destination, port, by, probe.protocol, source, probe.mark, probe.device or None)
    return found.verdict


def disagreements(probe: Probe, verdicts: Verdicts, seen: Seen) -> list[str]:
    """Where the kernel did something else."""
    ends = [each["hit"] for each in seen.get("answers") or seen.get("each") or [seen]]
    if len(ends) != len(verdicts):
        return [f"{len(verdicts)} destinations, but {seen}"]
    found = []
    for (_, port), verdict, hit in zip(probe.destinations, verdicts, ends, strict=True):
        got: set[Action] = {_CAPTURED.get(hit, "pass")}
        if _PORTS.get(hit) == port:  # the proxy's own port looks the same captured and direct
            got.add("pass")
        if hit in UNREACHABLE:
            got.add("unreachable")
        if verdict.action not in got:
            found.append(f"{verdict.action} by {verdict.rule}, but it went to {hit}")
    return found
