"""`sidestep probe`: whether capture will work on this node, and if not, what to do.

The agent examines the node in the same way before it touches anything, so it must be quick: no compiler runs here. The
command line has the real programs compiled and loaded on top, which takes a second.
"""

from bpf.acceleration import other_owners
from bpf.errors import KernelRefused
from bpf.layout import Level
from bpf.probing.features import Feature, Presence, try_features
from installer.probe.attach_point import attach_point_findings, bpffs, earlier_installation, programs
from installer.probe.findings import Finding, Findings
from installer.probe.foreign_programs import other_programs
from installer.probe.host import host
from installer.probe.needs import MINIMUM, NEEDS
from installer.probe.process import process
from installer.scratch import scratch_places
from installer.settings import Attachment, Chain, Node


def examine(attachment: Attachment, chain: Chain, node: Node) -> Findings:
    """Look at everything but the programs themselves, which attaching compiles and loads anyway. Some 30 ms."""
    point, points = attach_point_findings(attachment)
    rows = [
        *process(),
        *points,
        bpffs(attachment),
        *(_row(feature) for feature in try_features(scratch_places(point))),
        *other_programs(point),
        *earlier_installation(attachment),
        *host(chain, node),
    ]
    return Findings(tuple(rows))


def examine_programs(attachment: Attachment, chain: Chain, node: Node) -> Findings:
    """All that examine() looks at; and this version's own programs, compiled and with connections sent through them."""
    found = examine(attachment, chain, node)
    found = Findings((*found.rows, programs(attachment)))
    if not found.works:
        return found
    return Findings((*found.rows, *_connections(attachment), _acceleration(attachment)))


def require_capable(attachment: Attachment, chain: Chain, node: Node) -> None:
    """For the agent: raise NodeUnfit, with the table, when capture can't work here."""
    examine(attachment, chain, node).require()


def _connections(attachment: Attachment) -> list[Finding]:
    from installer.probe.trial_connections import trial_connections

    try:
        return list(trial_connections(attachment))
    except KernelRefused as error:
        # where nothing may be written below the attach point; the small programs were tried elsewhere
        return [
            Finding(
                "trial", "everything", f"not with the real programs: {error}", Presence.WARNING, "mount it writable"
            )
        ]


def _acceleration(attachment: Attachment) -> Finding:
    """How far it goes here. Capture works without."""
    from installer.acceleration.level import judge
    from installer.acceleration.selftest import try_kernel

    found = judge(Level.FULL, try_kernel(attachment.attach_point()), list(other_owners(attachment.pins)))
    what, needed_by = "acceleration", "speed within the node"
    if found.level is Level.FULL:
        return Finding(what, needed_by, f"level {found.level}", Presence.YES, found.reason)
    return Finding(
        what, needed_by, f"level {found.level}: {found.reason}", Presence.WARNING, "see docs/acceleration.md"
    )


def _row(feature: Feature) -> Finding:
    need = NEEDS[feature.name]
    return Finding(need.label, need.needed_by, feature.found, feature.verdict, _advice(feature, need.since))


def _advice(feature: Feature, since: str) -> str:
    if feature.verdict is Presence.YES:
        return ""
    if feature.verdict is Presence.UNKNOWN:
        return "see the other rows"
    return (
        f"a kernel with it: Linux {since} or newer ({MINIMUM} for all of this table), with BPF and cgroups configured"
    )
