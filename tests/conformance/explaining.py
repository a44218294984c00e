"""What `sidestep explain` says of the probes, asked of the maps while the pods are enrolled."""

from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path

from bpf.pins import Pins
from bpf.tables import Tables
from cni.policy.decision import Verdict
from installer.commands.explain.explainer import Asker, Explainer
from installer.commands.pods.enrolled_pods import find_pod
from installer.commands.pods.namespace import looked_into
from tests.conformance.configs import AmbientConfig, Config
from tests.conformance.parties import UNREACHABLE, judging, party, plain
from tests.conformance.probe import Probe
from tests.conformance.world import Seen

Verdicts = list[Verdict]  # one for each destination


def explained(pins: Pins, config: Config | AmbientConfig, probes: Iterable[Probe]) -> list[Verdicts]:
    """The verdicts of each probe, in order, by the enrolled pod whose rules decide."""
    explainers: dict[str, Explainer] = {}
    with Tables(pins) as tables:
        verdicts = []
        for probe in probes:
            name = judging(config, probe).name
            if name not in explainers:
                explainers[name] = _explainer(pins, tables, name)
            verdicts.append([_explain(explainers[name], probe, *each) for each in probe.destinations])
        return verdicts


def _explainer(pins: Pins, tables: Tables, name: str) -> Explainer:
    pod = find_pod(pins, tables, f"default/{name}")
    with looked_into(pod, Path("/proc")) as inside:
        assert inside is not None
        return Explainer(pod, tables, inside.interfaces)


def _explain(explainer: Explainer, probe: Probe, address: str, port: int) -> Verdict:
    destination = ip_address(address.partition("%")[0])
    if probe.is_from_outside:
        sender = ip_address(party(probe).outside[probe.place, plain(address).version])
        return explainer.inbound(sender, port, destination, probe.protocol).verdict
    source = ip_address(probe.source) if probe.source else None
    by = Asker(*probe.opener, is_proxy=probe.place == "ztunnel")
    found = explainer.outbound(destination, port, by, probe.protocol, source, probe.mark, probe.device or None)
    return found.verdict


def disagreements(probe: Probe, verdicts: Verdicts, seen: Seen) -> list[str]:
    """Where the kernel did something else."""
    ends = [each["hit"] for each in seen.get("answers") or seen.get("each") or [seen]]
    if ends[0] in UNREACHABLE:  # the prober has given up there
        verdicts, ends = verdicts[:1], ends[:1]
    if len(ends) != len(verdicts):
        return [f"{len(verdicts)} destinations, but {seen}"]
    return [
        f"{verdict.action} by {verdict.rule}, but it went to {hit}"
        for (_, port), verdict, hit in zip(probe.destinations[: len(ends)], verdicts, ends, strict=True)
        if verdict.action not in party(probe).takes(hit, port)
    ]
