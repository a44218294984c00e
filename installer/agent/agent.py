"""The node agent, from its start to its end.

The order of the start makes it safe: examine the node, attach the programs, enrol the pods that run already, serve the
CNI socket, and only then put the plugin into the chain and turn ready. So the agent can enrol pods before it takes
requests, and it answers requests before the chain names the plugin. Stopping changes nothing on the node: plugin, links
and maps stay, and pods keep their capture. If its DaemonSet was deleted or has another image now, the agent takes the
plugin away, nothing else.
"""

import resource
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import structlog

from bpf.errors import SidestepError
from bpf.holder import Holder, PinsHeld
from bpf.retained import Retained
from bpf.tables import Tables
from cni.enrolment.admission import Admission
from cni.enrolment.adoption import Adoption
from cni.enrolment.enroll import Enrolments
from cni.enrolment.exchange import Exchange
from cni.enrolment.failures import Failures
from cni.enrolment.follow import Follower
from cni.enrolment.hearing import Hearing
from cni.enrolment.left_out import LeftOut
from cni.enrolment.live import LivePolicies
from cni.enrolment.refusals import Refusals
from cni.enrolment.shadows import Shadows
from cni.enrolment.strict_proxies import StrictProxies
from cni.enrolment.whereabouts import Whereabouts
from cni.policy.enablement import DEFAULT as ENABLEMENT
from cni.policy.enablement import Enablement
from cni.policy.membership import skip_pod
from cni.policy.pod import Pod
from cni.policy.policies import Policies
from cni.server import Server
from cni.verbs import Verbs
from installer.acceleration import level
from installer.agent import coverage
from installer.agent.health import Readiness
from installer.agent.kept_log import KeptLog
from installer.agent.logs import configure_logging
from installer.agent.metrics import Metrics
from installer.agent.places import Places
from installer.agent.reconcile import NodeTables, Reconciler, no_ambient_policy, nothing_done
from installer.agent.repair import Repairs
from installer.agent.serving import serving
from installer.agent.shadow import ShadowKeeper, end_shadows
from installer.agent.signals import Signals
from installer.agent.strays import Strays
from installer.agent.takeover import TakeOver
from installer.host.captured import StillCaptured, captured_pods
from installer.host.install import Installer
from installer.host.uninstall import AgentRunning, leave_chain, uninstall_node
from installer.pods.deployment import Deployment, IstiosDeployment
from installer.pods.source import Source, require_source, source_of
from installer.probe.examine import attach_or_explain, require_capable
from installer.probe.memory import ADVISED, earlier_kills
from installer.settings import (
    Acceleration,
    Ambient,
    Attachment,
    Chain,
    Coverage,
    Following,
    Logging,
    Node,
    Ports,
    Repair,
    Shadow,
)

if TYPE_CHECKING:
    from installer.agent.ambient import AmbientMode

log = structlog.get_logger("agent")

# seconds that the start waits for the first list of Pods. After that the agent serves without the list: plugin calls
# then get an error message instead of a missing socket, and pods are enrolled once the list arrives
_SYNC_SECONDS = 5.0
# seconds that the start waits for another agent to end: the one of a DaemonSet that was just replaced
_HOLDER_SECONDS = 3.0
# seconds from a signal to the end, whatever still waits for an answer: kubelet gives 30, as the chart says
_END_SECONDS = 20


@dataclass(frozen=True)
class Settings:
    """All groups of the agent's settings."""

    attachment: Attachment
    node: Node
    chain: Chain
    repair: Repair
    acceleration: Acceleration
    coverage: Coverage
    following: Following
    shadow: Shadow
    ports: Ports
    logging: Logging
    ambient: Ambient = field(default_factory=Ambient)
    is_in_istios_daemonset: bool = False  # rather than in that of this repository


def run_agent(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises SidestepError if the node can't be set up."""
    configure_logging(settings.logging, kept := KeptLog())
    _tell_of_kills(settings.node)
    _allow_descriptors()
    require_source(settings.node)
    _require_ambient(settings)
    started = time.monotonic()
    with Signals(_END_SECONDS) as signals:
        for row in require_capable(settings.attachment, settings.chain, settings.node).warnings:
            log.warning("node.lacks", what=row.what, needed_by=row.needed_by, found=row.found, advice=row.advice)
        holder = Holder(settings.attachment.pins)
        with ExitStack() as up:
            up.enter_context(holder.held(_HOLDER_SECONDS))
            outcome = attach_or_explain(settings.attachment, settings.chain, settings.node)
            agent = _Agent(settings, holder, up)
            agent.enrol_what_runs()
            server = agent.server(kept)
            signals.call(server.stop, server.wakes)
            agent.install()
            agent.accelerate()
            log.info(
                "agent.serving",
                programs=str(outcome),
                cgroups=" ".join(map(str, agent.places.every())),
                pods=len(agent.enrolments),
                socket=str(settings.node.cni_agent_run_dir / "cni.sock"),
                health=agent.health_port,
                metrics=agent.metrics_port,
                seconds=round(time.monotonic() - started, 3),
            )
            server.serve()
            agent.readiness.set("serving", False, "stopping")
        # only now: the threads that would put everything back have ended
        if agent.deployment and (why := agent.deployment.why_leaving()):
            _leave(settings, why)


def _require_ambient(settings: Settings) -> None:
    """Raise SidestepError if ambient mode is on and can't be as it is asked for."""
    if not settings.node.ambient_enabled:
        return
    if settings.node.pods is not None:
        raise SidestepError(
            "ambient mode needs an API server: labels of namespaces choose pods, and istiod is told by an annotation; "
            "give --kubernetes-node-name instead of --pods, or leave --ambient-enabled out"
        )
    if settings.shadow.shadow:
        raise SidestepError(
            "shadow mode is for pods with sidecars, and ztunnel takes orders from istio-cni meanwhile; leave "
            "--ambient-enabled out"
        )
    Enablement(settings.ambient.ambient_enablement_selector or ENABLEMENT)


def _leave(settings: Settings, why: str) -> None:
    """Take out the plugin for good. Pods that run stay captured until they end, or until a person ends it.

    Nothing is taken out if the agent of another DaemonSet has come already: when shadow mode goes over to capture.
    """
    try:
        done = _undone(settings)
    except (AgentRunning, PinsHeld) as error:
        log.info("uninstalled.nothing", why=str(error))
        return
    for sentence in done:
        log.info("uninstalled", what=sentence, because=why)
    if pods := captured_pods(settings.attachment.pins, settings.node.proc):
        log.warning(
            "capture.goes_on", pods=len(pods), until="the pods end", to_end_it="sidestep uninstall --end-capture"
        )


def _undone(settings: Settings) -> list[str]:
    """A sentence for each thing that is taken out. Raises AgentRunning and PinsHeld.

    In shadow mode that is all of sidestep. If there are pods that it captures, because nobody else did, programs and
    maps stay for them, and the shadow pods are let go.
    """
    # in Istio's DaemonSet agents may have to leave at each end, and then others go on
    if not settings.shadow.shadow or settings.is_in_istios_daemonset:
        return leave_chain(settings.node, settings.chain)
    try:
        return uninstall_node(settings.attachment, settings.node, settings.chain, end_capture=False)
    except StillCaptured:
        done = leave_chain(settings.node, settings.chain)
    pins = settings.attachment.pins
    with Holder(pins).held(0), Tables(pins) as tables, closing(Enrolments(pins, tables)) as enrolments:
        if gone := end_shadows(tables, enrolments.shadows(), enrolments.remove):
            done.append(f"{gone} shadow pods let go")
    return done


def _tell_of_kills(node: Node) -> None:
    """Say what an agent before this one could not say: it was killed for want of memory."""
    if number := earlier_kills(node.proc):
        log.warning(
            "agent.killed_before", kills=number, why="no memory left below the limit", advice=f"allow {ADVISED} or more"
        )


def _allow_descriptors() -> None:
    """Allow as many open files as this process may have: it keeps one for each pod."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class _Agent:
    """The parts of a running agent, made in the order in which they need each other; `up` ends them in reverse."""

    def __init__(self, settings: Settings, holder: Holder, up: ExitStack) -> None:
        pins = settings.attachment.pins
        self._settings, self._up = settings, up
        self._tables = tables = up.enter_context(Tables(pins))
        retained = up.enter_context(Retained(pins))
        self.places = places = Places(settings.attachment, retained)
        self.enrolments = Enrolments(pins, tables)
        up.callback(self.enrolments.close)
        self.metrics = Metrics(pins, tables, self.enrolments, settings.node.proc)
        conditions = ["attached", "synced", "serving", "repairs", *(["installed"] if settings.chain.install else [])]
        conditions += ["namespaces"] if settings.node.ambient_enabled else []
        self.readiness = Readiness(*conditions)
        self.readiness.follow("attached", self._why_detached)
        ports = settings.ports
        self.health_port = up.enter_context(serving(ports.health_port, self.readiness.answers(), "health"))
        self.metrics_port = up.enter_context(serving(ports.monitoring_port, self.metrics.answers(), "metrics"))

        # made before everything that subscribes to it; the watch starts in enrol_what_runs()
        self.source: Source = source_of(settings.node, self.metrics.observe_api_request)
        api = self.source.api
        deployment = IstiosDeployment if settings.is_in_istios_daemonset else Deployment
        self.deployment = deployment(api, settings.node.pod_namespace, settings.node.daemonset) if api else None
        proxies = StrictProxies(self.source.pods, tables, places.every, lambda cookie: self._reconciler.learned(cookie))
        follower = Follower(self.enrolments, proxies, settings.node.proc)
        self.follower = follower
        covered = settings.coverage
        policies = Policies(covered.uncaptured, covered.uncaptured_exempt_namespaces, settings.following.live_policy)
        self._has_shadows = settings.shadow.shadow
        # until the installer has looked, istio-cni's agent may be there
        self._stands_by = self._has_shadows and settings.chain.install
        self.admission = Admission(
            self.enrolments, follower, settings.node.proc, policies=policies, has_shadows=self._has_shadows
        )
        hearing = Hearing(self.enrolments, pins, settings.node.proc)
        up.callback(hearing.close)
        adoption = Adoption(self.admission, hearing, settings.node.proc)
        self._left_out, self._refusals = LeftOut(self.source.events), Refusals()
        self._failures = Failures(tables)
        skips = partial(_why_skipped, settings.node)
        self._exchange = Exchange(
            adoption, self.source.pods, pins, settings.node.cni_agent_run_dir, skips, self.source.events
        )
        self._live = LivePolicies(self.enrolments, self.source.events, policies)
        self._repairs = Repairs(
            settings=settings.repair,
            actions=self.source.api,
            adoption=adoption,
            is_enrolled=self._is_enrolled,
            events=self.source.events,
            observe=self.metrics.observe_repair,
            skips=skips,
            gives_way=lambda: self._stands_by,
        )
        self.readiness.follow("repairs", self._repairs.why_forbidden)
        self._ambient = self._ambient_mode(adoption)
        strays = Strays(
            pins=pins,
            enrolments=self.enrolments,
            proc=settings.node.proc,
            pods_of=lambda cookies: self._reconciler.pods_of(cookies),
            events=self.source.events,
            learned=lambda cookie: self._reconciler.learned(cookie),
            cover=places.cover,
        )
        self._reconciler = Reconciler(
            place=NodeTables(pins, places, tables),
            node=settings.node,
            pods=self.source.pods,
            enrolments=self.enrolments,
            follower=follower,
            adoption=adoption,
            events=self.source.events,
            observe=self.metrics.observe_reconcile,
            claims=self._repairs.claims,
            follow=lambda: self._live.look(self.source.pods),
            hold=holder.keep,
            retained=retained,
            take_over=TakeOver(pins, self.enrolments, adoption, self.source.pods, self.source.events).take,
            left_out=self._left_out,
            refusals=self._refusals,
            failures=self._failures,
            is_exchanging=self._exchange.is_under_way,
            was_broken=self._repairs.has_failed,
            strays=strays.look_for_strays,
            strays_soon=strays.look_for_strays_soon,
            ambient_policy=self._ambient.members.policy_of if self._ambient else no_ambient_policy,
            probes=self._ambient.look_for_kubelet if self._ambient else nothing_done,
        )

    def _ambient_mode(self, adoption: Adoption) -> "AmbientMode | None":
        """The parts of ambient mode, if it is on."""
        settings = self._settings
        if not settings.node.ambient_enabled:
            return None
        from installer.agent.ambient import AmbientMode
        from installer.ambient.capture import KernelCapture

        capture = KernelCapture(self.admission, lambda cookie: self._reconciler.learned(cookie))
        pins, tables = settings.attachment.pins, self._tables
        mode = AmbientMode(settings.ambient, settings.node, self.source, capture, adoption, pins, tables, self.places)
        self.metrics.follow_ambient(mode.members.states, lambda: mode.members.zds.connected)
        return mode

    def enrol_what_runs(self) -> None:
        """Follow the enrolled pods, start watching Pods, and enrol the pods that run without being enrolled."""
        if self.deployment:
            self._up.enter_context(self.deployment.running())  # entered first, so it ends last
        self._up.enter_context(self.follower.running())
        self.source.subscribe(self._reconciler.changed)
        self.source.subscribe(self._repairs.changed)
        self.source.subscribe_always(self._live.changed)
        if self._ambient:
            self._ambient.subscribe()
        self.source.on_synced(self._synced)
        self._up.enter_context(self.source.running())
        if not self.source.wait_synced(_SYNC_SECONDS):
            log.warning("agent.not_synced", seconds=_SYNC_SECONDS, consequence="pods are enrolled once they are known")
        self._begin_shadows()
        self._exchange.complete()
        self._reconciler.once()
        self._up.enter_context(self._reconciler.running(self._settings.repair.reconcile_seconds))
        if self._ambient:
            self.readiness.follow("namespaces", self._ambient.namespaces.why_stale)
            self._up.enter_context(self._ambient.running(self._settings.repair.reconcile_seconds))
        keeper = coverage.Coverage(
            self._tables,
            self.enrolments.identities,
            self._reconciler.pods_of,
            self.source.events,
            self._settings.coverage.uncaptured_events,
        )
        self._up.enter_context(keeper.running())

    def _begin_shadows(self) -> None:
        """Compare for shadow pods from now on; without shadow mode, let those go that an earlier agent has made."""
        shadows = Shadows(self._tables, self.enrolments, self._settings.node.proc)
        if not self._has_shadows:
            gone = end_shadows(self._tables, self.enrolments.shadows(), self._reconciler.let_go)
            if gone:
                log.info("shadow.ended", pods=gone, why="the agent runs without --shadow", captured_by="Istio's rules")
            return
        keeper = ShadowKeeper(shadows, self.enrolments.identities, self._reconciler.pods_of, self.source.events)
        self._up.enter_context(keeper.running())

    def server(self, kept: KeptLog) -> Server:
        """The CNI server, whose socket listens already; it also tells what was logged."""
        verbs = Verbs(
            self.source.pods,
            self.enrolments,
            self.follower,
            self.admission,
            Whereabouts.at_start(self._settings.attachment.pins, self.places.cover),
            self.source.events,
            observe=self.metrics.observe_enrolment,
            call_for_help=self._reconciler.wake,
            left_out=self._left_out,
            refusals=self._refusals,
            exchanges=self._exchange,
            what_failed=self._failures.documents,
            ambient=self._ambient.members if self._ambient else None,
        )
        run_dir = self._settings.node.cni_agent_run_dir
        server = Server(run_dir, verbs, self.metrics.observe_request, kept.lines)
        self.readiness.follow("serving", server.why_deaf)
        return server

    def install(self) -> None:
        """Put the plugin in place and keep it there, if the settings ask for it."""
        if self._settings.chain.install:
            installer = Installer(
                self._settings.chain,
                self._settings.node,
                self.metrics.observe_install,
                self._installed,
                self._has_shadows,
            )
            self._up.enter_context(installer.running())

    def accelerate(self) -> None:
        """Start the thread that finds and keeps the acceleration level; the start does not wait for it."""
        node, pins = self._settings.node, self._settings.attachment.pins
        keeper = level.LevelKeeper(pins, self._tables, self.places.every()[0], node.cni_agent_run_dir)
        self._up.enter_context(keeper.running(self._settings.acceleration.level))

    def _installed(self, ok: bool, why: str) -> None:
        self.readiness.set("installed", ok, why)
        self._stands_by = ok and bool(why)  # only in shadow mode that is as it should be
        self.metrics.set_install_ready(ok and not why)  # in shadow mode it is ready, although the chain is istio-cni's

    def _synced(self) -> None:
        self.readiness.follow("synced", self.source.why_stale)
        self._reconciler.wake()

    def _why_detached(self) -> str:
        return "" if self.enrolments.is_attached() else "a link, program or map is gone; `sidestep status` says which"

    def _is_enrolled(self, pod: Pod) -> bool:
        return self._reconciler.is_enrolled(pod)


def _why_skipped(node: Node, pod: Pod) -> str | None:
    return skip_pod(pod, node.pod_namespace, node.exclude_namespaces)
