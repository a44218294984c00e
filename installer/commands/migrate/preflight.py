"""Looks for what istio-cni has on this node: its DaemonSet, its chain entry, and pods that its rules capture."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpf.errors import SidestepError
from cni.enrolment.bystanders import crowds_with_rules
from cni.netns.processes import Crowd
from cni.policy.membership import INIT_CONTAINER
from cni.policy.pod import Pod
from installer.ambient.redirection import ANNOTATION
from installer.commands.pods.differences import Described, described
from installer.host.chain import PLUGIN, entry_of
from installer.host.confdir import ConfDirectory
from installer.host.rival import serving_rival
from installer.pods.api import Api
from installer.pods.resource import DAEMONSET
from installer.settings import Chain, Node

_NAMED = 10  # pods named in a line
_GUIDE = "docs/migration.md"
_UNKNOWN = "not known"


@dataclass(frozen=True)
class Line:
    """One thing that was looked at: what was found, and what to do about it ("": nothing)."""

    what: str
    found: str
    advice: str = ""

    @property
    def is_good(self) -> bool:
        """Whether nothing needs doing."""
        return not self.advice

    def __str__(self) -> str:
        return f"{self.what}: {self.found}{self.advice and '; ' + self.advice}"

    def document(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"what": self.what, "found": self.found, "advice": self.advice}


def preflight(chain: Chain, node: Node) -> list[Line]:
    """All lines, in the order of the steps of a migration."""
    now = described(node)
    rules = _with_rules(node.proc, now)
    return [_daemonset(node), _entry(chain, node), *rules, _with_init(now.pods, now.problem)]


def _daemonset(node: Node) -> Line:
    what = f"DaemonSet in {node.pod_namespace}"
    if node.pods is not None:
        return Line(what, "none, as this node has no API server")
    try:
        api = Api.of(node, lambda verb, status: None)
        try:
            found = api.get_daemonset(node.pod_namespace, DAEMONSET)
        finally:
            api.close()
    except SidestepError as error:
        return Line(what, f"{_UNKNOWN}: {error}", "look at it with kubectl get daemonset -A")
    if found is None:
        return Line(what, f"no {DAEMONSET}")
    if not found.runs_install_cni:
        return Line(what, f"sidestep's own, with {found.image}")
    advice = f"if that is istio-cni's image, give the DaemonSet sidestep's, or remove istio-cni at the end ({_GUIDE})"
    return Line(what, f"{DAEMONSET} of Istio's chart, with {found.image}", advice)


def _entry(chain: Chain, node: Node) -> Line:
    what = "CNI chain"
    try:
        directory = ConfDirectory(chain, entry_of(node))
        replaced, own = directory.replaced(), directory.holding()
    except SidestepError as error:
        return Line(what, f"{_UNKNOWN}: {error}", "give --mounted-cni-net-dir the node's CNI configuration directory")
    ours = f"; {PLUGIN} is in {', '.join(own)}" if own else ""
    if not replaced:
        return Line(what, f"no plugin of istio-cni{ours}")
    files = ", ".join(file for file, _ in replaced)
    if serving_rival((entry for _, entry in replaced), node.proc):
        advice = (
            f"sidestep leaves the chain alone while that agent runs: remove istio-cni when sidestep is up ({_GUIDE})"
        )
        return Line(what, f"istio-cni's plugin is in {files}, and its agent runs{ours}", advice)
    return Line(
        what, f"istio-cni's plugin is in {files}, but its agent does not run{ours}", "sidestep's agent takes its place"
    )


def _with_rules(proc: Path, now: Described) -> Iterator[Line]:
    """A line about the pods of Istio's plugin, and one about those that Istio's agent holds in ambient mode."""
    what, what_ambient = "pods with Istio's rules", "pods in Istio's ambient mode"
    try:
        found = crowds_with_rules(proc)
    except OSError as error:
        for each in (what, what_ambient):
            yield Line(each, f"{_UNKNOWN}: {proc}: {error.strerror}", "give --proc a procfs of the node, as root")
        return
    pods = [(_pod_of(crowd, now.pods or ()), crowd) for crowd in found]
    ambient = sorted(f"{pod.namespace}/{pod.name}" for pod, _ in pods if pod and ANNOTATION in pod.annotations)
    others = sorted(_name_of(pod, crowd) for pod, crowd in pods if not (pod and ANNOTATION in pod.annotations))
    advice = "they go on as they are; create them anew (kubectl rollout restart) to change who captures"
    yield Line(what, _listed(others), advice) if others else Line(what, "none")
    if ambient:
        advice = (
            "their rules stay as long as they run; when sidestep serves this node with ambient mode, create them anew "
            f"({_GUIDE})"
        )
        yield Line(what_ambient, _listed(ambient), advice)
    elif now.pods is None and others:
        yield Line(what_ambient, f"{_UNKNOWN}: {now.problem}", "give --kubeconfig and --kubernetes-node-name")
    else:
        yield Line(what_ambient, "none")


def _with_init(pods: Iterable[Pod] | None, problem: str) -> Line:
    what = f"pods with {INIT_CONTAINER}"
    if pods is None:
        return Line(what, f"{_UNKNOWN}: {problem}", "give --kubeconfig and --kubernetes-node-name")
    with_init = (pod for pod in pods if any(each.name == INIT_CONTAINER for each in pod.containers))
    names = sorted(f"{pod.namespace}/{pod.name}" for pod in with_init if pod.is_running)
    if not names:
        return Line(what, "none")
    advice = f"no CNI plugin captures them: set pilot.cni.enabled=true for istiod, then create them anew ({_GUIDE})"
    return Line(what, _listed(names), advice)


def _pod_of(crowd: Crowd, pods: Iterable[Pod]) -> Pod | None:
    return next((pod for pod in pods if crowd.is_of(pod.uid, pod.container_ids)), None)


def _name_of(pod: Pod | None, crowd: Crowd) -> str:
    if pod:
        return f"{pod.namespace}/{pod.name}"
    return f"UID {next(iter(crowd.pod_uids))}" if crowd.pod_uids else f"process {crowd.pids[0]}"


def _listed(names: list[str]) -> str:
    return f"{len(names)}: {', '.join(names[:_NAMED])}" + (f" and {len(names) - _NAMED} more" * (len(names) > _NAMED))
