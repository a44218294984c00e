"""`sidestep probe`: whether capture will work on this node, and if not, what to do.

The agent looks at the same things before it touches anything, so that must be quick: no compiler runs for it. Attaching
compiles and loads the programs anyway. If that fails the agent does all that the command does, for the sake of its log.
"""

from bpf.acceleration import other_owners
from bpf.attachment import Outcome, attach_programs
from bpf.errors import CompileFailed, KernelRefused
from bpf.layout import Level
from installer.probe.attach_point import attach_point_findings, bpffs, earlier_installation
from installer.probe.findings import Finding, Findings, Presence
from installer.probe.foreign_programs import other_programs
from installer.probe.host import host
from installer.probe.loading import loading
from installer.probe.process import process
from installer.settings import Attachment, Chain, Node


def examine(attachment: Attachment, chain: Chain, node: Node) -> Findings:
    """Look at everything but the programs themselves. A few milliseconds."""
    point, points = attach_point_findings(attachment)
    rows = [
        *process(),
        *points,
        bpffs(attachment),
        *other_programs(point),
        *earlier_installation(attachment),
        *host(chain, node),
    ]
    return Findings(tuple(rows))


def examine_programs(attachment: Attachment, chain: Chain, node: Node) -> Findings:
    """All that examine() looks at; and this version's own programs, loaded and with connections sent through them."""
    found = examine(attachment, chain, node)
    found = Findings((*found.rows, *loading(attachment)))
    if not found.works:
        return found
    from installer.probe.trial_connections import trial_connections

    return Findings((*found.rows, *trial_connections(attachment), _acceleration(attachment)))


def require_capable(attachment: Attachment, chain: Chain, node: Node) -> None:
    """For the agent, before it attaches: raise NodeUnfit, with the table, when capture can't work here."""
    examine(attachment, chain, node).require()


def attach_or_explain(attachment: Attachment, chain: Chain, node: Node) -> Outcome:
    """For the agent: attach the programs.

    If the kernel refuses them, raise NodeUnfit with the table that says which, and leave nothing attached.
    """
    try:
        return attach_programs(attachment.pins, attachment.attach_point())
    except (CompileFailed, KernelRefused):
        examine_programs(attachment, chain, node).require()
        raise  # no row says why


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
