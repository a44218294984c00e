"""The node agent: attach or re-open the programs, then serve CNI requests until told to stop.

Start order matters: requests are taken only once everything is attached, so being able to connect to the socket means
being able to enrol. Stopping changes nothing on the node: links and maps stay, pods keep their capture.
"""

import signal
import sys
import time
from types import FrameType

import structlog

from bpf.attachment import attach
from bpf.errors import SidestepError
from bpf.tables import Tables
from cni.admission import Admission
from cni.containers import StrictProxies
from cni.enroll import Enrolments
from cni.follow import Follower
from cni.pod import PodSource
from cni.server import Server
from cni.verbs import Verbs
from installer.pods.directory import PodDirectory
from installer.settings import Attachment, Chain, Logging, Node, Ports, Repair

log = structlog.get_logger("agent")


def run(attachment: Attachment, node: Node, chain: Chain, repair: Repair, ports: Ports, logging: Logging) -> None:
    """Serve until SIGTERM or SIGINT. Raises SidestepError when the node can't be set up."""
    configure_logging(logging)
    started = time.monotonic()
    source = _pods(node)
    cgroup, run_dir = attachment.attach_point(), node.cni_agent_run_dir
    outcome = attach(attachment.pins, cgroup)
    with Tables(attachment.pins) as tables:
        enrolments = Enrolments(attachment.pins, tables)
        for identity in enrolments.reclaim():
            log.info("pod.reclaimed", pod=str(identity), container=identity.container_id)
        follower = Follower(enrolments, StrictProxies(source, tables, cgroup))
        server = Server(run_dir, Verbs(source, enrolments, follower, Admission(enrolments, follower)))

        def stop(number: int, _: FrameType | None) -> None:
            log.info("agent.stopping", signal=signal.Signals(number).name)
            server.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        log.info(
            "agent.ready",
            programs=str(outcome),
            cgroup=str(cgroup),
            pods=len(enrolments),
            socket=str(run_dir / "cni.sock"),
            seconds=round(time.monotonic() - started, 3),
        )
        with follower.running():
            server.serve()


def _pods(node: Node) -> PodSource:
    if node.pods is None:
        raise SidestepError("nowhere to get Pods from; give --pods DIR or --kubernetes-node-name NAME")
    return PodDirectory(node.pods)


def configure_logging(logging: Logging) -> None:
    """One line an event on stderr."""
    keys = ["timestamp", "level", "event"]
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer()
            if logging.log_as_json
            else structlog.processors.LogfmtRenderer(key_order=keys),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.log_level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
