"""Examines whether capture will work on this node: for `sidestep probe`, and for the agent's start.

The agent examines everything but the programs before it attaches. That is quick, because no compiler runs. Attaching
loads the programs. If attaching fails, the agent does all that the command does, so that its log says why.
"""

from bpf.acceleration import other_owners
from bpf.attachment import Outcome
from bpf.covering import attach_where_pods_are
from bpf.errors import CompileFailed, KernelRefused
from bpf.extras import ACCELERATION
from bpf.layout import Level
from installer.probe.attach_point import attach_point_findings, bpffs, earlier_installation
from installer.probe.findings import Finding, Findings, Presence
from installer.probe.foreign_programs import other_programs
from installer.probe.host import host
from installer.probe.loading import loading
from installer.probe.memory import memory
from installer.probe.process import process
from installer.settings import Attachment, Chain, Node


def examine(attachment: Attachment, chain: Chain, node: Node) -> Findings:
    """Examine everything but the programs themselves. Takes a few milliseconds."""
    places, points = attach_point_findings(attachment)
    rows = [
        *process(),
        memory(node.proc),
        *points,
        bpffs(attachment),
        *other_programs(places),
        *earlier_installation(attachment),
        *host(chain, node),
    ]
    return Findings(tuple(rows))


def examine_programs(attachment: Attachment, chain: Chain, node: Node) -> Findings:
    """Examine everything: also load our programs and, if all is well, send connections through them."""
    found = examine(attachment, chain, node)
    found = Findings((*found.rows, *loading(attachment)))
    if not found.works:
        return found
    from installer.probe.trial_connections import trial_connections

    is_lacking = any(row.what == ACCELERATION.name for row in found.rows)
    level = [] if is_lacking else [_acceleration(attachment)]
    return Findings((*found.rows, *trial_connections(attachment), *level))


def require_capable(attachment: Attachment, chain: Chain, node: Node) -> Findings:
    """For the agent, before it attaches. Raises NodeUnfit, with the table, if capture can't work on this node."""
    found = examine(attachment, chain, node)
    found.require()
    return found


def attach_or_explain(attachment: Attachment, chain: Chain, node: Node) -> Outcome:
    """For the agent: attach the programs.

    If the kernel refuses them, raises NodeUnfit, whose table says which, and leaves nothing attached. If no row of the
    table says why, raises CompileFailed or KernelRefused.
    """
    try:
        return attach_where_pods_are(attachment.pins, attachment.choice())
    except (CompileFailed, KernelRefused):
        examine_programs(attachment, chain, node).require()
        raise  # no row says why


def _acceleration(attachment: Attachment) -> Finding:
    """The highest acceleration level that this node allows. Capture works without acceleration."""
    from installer.acceleration.level import judge
    from installer.acceleration.selftest import try_kernel

    found = judge(Level.FULL, try_kernel(attachment.attach_point()), list(other_owners(attachment.pins)))
    what, needed_by = "acceleration", "speed within the node"
    if found.level is Level.FULL:
        return Finding(what, needed_by, f"level {found.level}", Presence.YES, found.reason)
    return Finding(
        what, needed_by, f"level {found.level}: {found.reason}", Presence.WARNING, "see docs/acceleration.md"
    )
