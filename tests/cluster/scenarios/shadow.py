"""Shadow mode beside Istio's unmodified chart, as docs/shadow.md says, under load: it comes, it goes, it gives way."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from tests.cluster.bed import CLIENT, NEAR, Bed
from tests.cluster.bed import FAR as BEDS_FAR
from tests.cluster.capturers import RULES, captured_by
from tests.cluster.checks import Check, equals, soon
from tests.cluster.host import CommandFailed
from tests.cluster.istio_cni import DAEMONSET, IstioCni
from tests.cluster.kubectl_plugin import KubectlPlugin
from tests.cluster.load.load import FAR, LOAD, Load, load_on
from tests.cluster.load.load import NEAR as LOADS_NEAR
from tests.cluster.newcomers import enrolled_after
from tests.cluster.pods import PodName
from tests.cluster.release import Release
from tests.cluster.sidestep import NAMESPACE, SHADOW_DAEMONSET, Sidestep

_SHADOW = ("--set", "shadow=true")
_CHAIN = ["bridge", "portmap"]
_ISTIOS, _OURS = [*_CHAIN, "istio-cni"], [*_CHAIN, "sidestep-cni"]
_LOADS = (LOAD, LOADS_NEAR, FAR)
_ENOUGH = 50  # connections of one node that were compared
_MORE = 20  # requests of each flow meanwhile


def checks(bed: Bed) -> Iterator[Check]:
    """No request fails, nothing of istio-cni's is touched, and both decide alike."""
    istio, agents = IstioCni(bed.cluster), Sidestep(bed.cluster, SHADOW_DAEMONSET)
    release = Release(bed, agents)
    istio.import_image()
    made: list[PodName] = []
    try:
        # no pod of sidestep's is left: whoever tries shadow mode has only Istio's
        bed.pods.delete(CLIENT, NEAR, BEDS_FAR)
        bed.sidestep.remove()
        istio.install()
        made += bed.make_on_each("ruled")
        with load_on(bed) as load:
            before = _istios(bed)
            yield load.during("shadow mode comes, by helm install beside istio-cni", partial(release.install, *_SHADOW))
            made += bed.make_on_each("ruled-beside")
            load.wait_for_more(_MORE)
            yield from _looks_on(bed, agents, made)
            yield from _plugin(bed)
            yield Check("helm upgrade with shadow=false is refused beside istio-cni", partial(_not_refused, release))
            yield from _left_alone(bed, before)
            yield load.during("shadow mode goes, by helm uninstall", release.uninstall)
            yield from _left_alone(bed, before)
            yield from captured_by(bed, [*made, *_LOADS], RULES)
            for node in bed.cluster.nodes:
                pins = partial(node.host.run, ["find", "/sys/fs/bpf", "-name", "sidestep"])
                yield Check(f"no program and no map is left on {node.name}", equals(pins, ""))
            yield from _goes_over(bed, istio, agents, load)
            yield from captured_by(bed, [*made, *_LOADS], RULES)
    finally:
        bed.pods.delete(*made)
        release.uninstall()
        istio.uninstall()  # waits for whatever has the label of its pods, so for sidestep's too
        bed.sidestep.apply()
        bed.make_pods()


def _looks_on(bed: Bed, agents: Sidestep, made: list[PodName]) -> Iterator[Check]:
    """Each pod is a shadow pod, and no connection was treated in another way."""
    names = {str(pod) for pod in (*made, *_LOADS)}
    listed = partial(_states, bed, agents)
    yield Check("every pod is a shadow pod", soon(equals(listed, dict.fromkeys(names, "shadow"))))
    for node in bed.cluster.nodes:
        yield Check(f"both decide alike on {node.name}", soon(partial(_differs, agents, node.name)))
        finds_none = partial(_finds_no_istio, agents, node.name)
        yield Check(f"sidestep migrate --check on {node.name} finds istio-cni", finds_none)


def _states(bed: Bed, agents: Sidestep) -> dict[str, str]:
    return {each["pod"]: each["state"] for node in bed.cluster.nodes for each in agents.ask_json(node.name, "pods")}


def _differs(agents: Sidestep, node: str) -> str:
    """What differs there, or that too little was compared."""
    found = agents.told(node, "shadow")
    different = [each for each in found if each["verdict"] == "different" or each["different"]]
    same = sum(each["same"] for each in found)
    return str(different or (f"only {same} connections compared: {found}" if same < _ENOUGH else ""))


def _finds_no_istio(agents: Sidestep, node: str) -> str:
    told = agents.told(node, "migrate --check")
    return "" if any(f"{DAEMONSET} of Istio's chart" in each["found"] for each in told["findings"]) else str(told)


def _plugin(bed: Bed) -> Iterator[Check]:
    """The plugin for kubectl asks sidestep's agents, not istio-cni's."""
    plugin = KubectlPlugin(bed, SHADOW_DAEMONSET)
    told = plugin.told("shadow", str(LOAD))
    yield Check(f"kubectl sidestep shadow {LOAD}", equals(lambda: (told["pod"], told["verdict"]), (str(LOAD), "same")))
    yield Check("kubectl sidestep status is OK", equals(lambda: plugin.told("status")["state"], "ok"))


def _not_refused(release: Release) -> str:
    try:
        release.change(shadow="false")
    except CommandFailed as error:
        return "" if "cannot be imported into the current release" in str(error) else str(error)
    return "Helm has done it"


def _istios(bed: Bed) -> dict[str, Any]:
    """What must stay as it is of istio-cni's: the DaemonSet as somebody has made it, and its pods with their starts."""
    found = bed.control.get("daemonset", "-n", NAMESPACE, DAEMONSET)["metadata"]
    pods = bed.control.get("pods", "-n", NAMESPACE, "-l", f"k8s-app={DAEMONSET}")
    starts = {each["metadata"]["name"]: each["status"]["containerStatuses"][0]["restartCount"] for each in pods}
    ready = [each["status"]["containerStatuses"][0]["ready"] for each in pods]
    return {"uid": found["uid"], "generation": found["generation"], "starts": starts, "ready": ready}


def _left_alone(bed: Bed, before: dict[str, Any]) -> Iterator[Check]:
    yield Check("istio-cni's DaemonSet and pods are as they were", equals(partial(_istios, bed), before))
    for node in bed.cluster.nodes:
        yield Check(f"the chain of {node.name} is istio-cni's", equals(node.plugins, _ISTIOS))


def _goes_over(bed: Bed, istio: IstioCni, agents: Sidestep, load: Load) -> Iterator[Check]:
    """From shadow mode to capture: istio-cni goes first."""
    release = Release(bed, agents)
    yield load.during("shadow mode comes again", partial(release.install, *_SHADOW))
    yield load.during("istio-cni goes beside it", istio.uninstall)
    yield from _in_chain(bed, "enters")
    yield from enrolled_after(replace(bed, sidestep=agents), "istio-cni has gone")
    yield load.during("shadow mode ends, by helm upgrade with shadow=false", partial(_capture, bed, release))
    yield Check("the agents of shadow mode have gone", soon(equals(agents.pods, [])))
    yield from _in_chain(bed, "is in")
    for node in bed.cluster.nodes:
        yield Check(f"no shadow pod is left on {node.name}", soon(partial(_shadows_left, bed, node.name)))
    yield from enrolled_after(bed, "shadow mode")


def _capture(bed: Bed, release: Release) -> None:
    release.change(shadow="false")
    bed.sidestep.wait_until_rolled_out()


def _in_chain(bed: Bed, how: str) -> Iterator[Check]:
    for node in bed.cluster.nodes:
        yield Check(f"sidestep {how} the chain of {node.name}", soon(equals(node.plugins, _OURS)))


def _shadows_left(bed: Bed, node: str) -> str:
    return ", ".join(each["pod"] for each in bed.sidestep.ask_json(node, "pods") if each["state"] == "shadow")
