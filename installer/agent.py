"""The node agent: attach or re-open the programs, then serve CNI requests until told to stop.

Start order matters: requests are taken only once everything is attached, so being able to connect to the socket means
being able to enrol. Stopping changes nothing on the node: links and maps stay, pods keep their capture.
"""

import logging
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import structlog

from bpf.attachment import attach
from bpf.tables import Tables
from cni.containers import StrictProxies
from cni.enroll import Enrolments
from cni.follow import Follower
from cni.server import Server
from cni.verbs import Verbs
from installer.pods import PodDirectory
from installer.settings import Attachment

log = structlog.get_logger("agent")


def run(where: Attachment, run_dir: Path, pods: Path, log_level: str) -> None:
    """Serve until SIGTERM or SIGINT. Raises SidestepError when the node can't be set up."""
    configure_logging(log_level)
    started = time.monotonic()
    outcome = attach(where.pins, where.cgroup)
    with Tables(where.pins) as tables:
        enrolments = Enrolments(where.pins, tables)
        for identity in enrolments.reclaim():
            log.info("pod.reclaimed", pod=str(identity), container=identity.container_id)
        source = PodDirectory(pods)
        follower = Follower(enrolments, StrictProxies(source, tables, where.cgroup))
        server = Server(run_dir, Verbs(source, enrolments, follower))

        def stop(number: int, _: FrameType | None) -> None:
            log.info("agent.stopping", signal=signal.Signals(number).name)
            server.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        log.info(
            "agent.ready",
            programs=str(outcome),
            cgroup=str(where.cgroup),
            pods=len(enrolments),
            socket=str(run_dir / "cni.sock"),
            seconds=round(time.monotonic() - started, 3),
        )
        with follower.running():
            server.serve()


def configure_logging(level: str) -> None:
    """One key=value line an event on stderr."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
