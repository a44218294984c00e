"""The status of a node for people: a line for each part, then programs, maps and pods as tables."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.text import Text

from cni.enrolment.steered import Steering
from cni.enrolment.strays import NOT_KNOWN, Stray, told_of
from installer.commands.maps.maps_table import maps_table
from installer.commands.printing import rendered, table

Document = dict[str, Any]

_PROGRAMS = ("program", "id", "attached", "loaded at", "bytes", "runs", "seconds")
_PODS = ("pod", "inbound", "level", "redirected", "bytes", "undrained", "over budget", "no peer")
_TEXTS = ("program", "pod", "inbound", "level", "loaded at")  # all other columns are numbers, aligned right


def status_table(document: Document) -> str:
    """The whole status."""
    lines = (Text(line) for line in _lines(document))
    if document["problem"]:
        return rendered(*lines)
    programs = (_program(each) for each in document["programs"])
    pods = ([each["pod"], each["steering"], *each["acceleration"].values()] for each in document["pods"])
    return rendered(
        *lines, table(_PROGRAMS, programs, _TEXTS), maps_table(document["maps"]), table(_PODS, pods, _TEXTS)
    )


def _lines(document: Document) -> Iterator[str]:
    yield f"sidestep {document['version']}, kernel {document['kernel']}"
    yield f"programs: {_attached(document)}"
    for layout, pods in document["kept_by_others"].items():
        names = ", ".join(pods) or "none"
        yield f"programs: another version's ({layout}) are attached too; pods that are not taken over: {names}"
    if document["problem"]:
        yield f"attach point: {_places(document) or 'none, because cgroup2 is not mounted'}"
    yield from _steering(document["pods"])
    yield from _strays(document["pods"])
    yield from _lost(document["pods"])
    yield from _sidecars(document["sidecars"])
    for name, instead in document["lacking"].items():
        yield f"kernel: without {name}{instead and ': '}{instead}"
    if told := document["acceleration"]:
        yield f"acceleration: {_level(told)}"
    chain, agent = document["chain"], document["agent"]
    plugin = chain["plugin"]
    yield f"plugin: {plugin['file']}: {plugin['fault'] or 'as in this version'}"
    yield f"chain: {_entry(chain['entry'])}"
    for remark in chain["entry"]["remarks"]:
        yield f"chain: {remark}"
    if document["pods"] and not chain["entry"]["found_in"]:
        count = len(document["pods"])
        yield f"chain: new pods are not captured by sidestep; {count} running pods stay captured until they end"
    yield f"agent: {_agent(agent)}"
    yield f"readiness: {_readiness(agent['health'])}"
    if not (document["problem"] or document["run_counts"]["on"]):
        yield f"runs of programs: not counted; {document['run_counts']['how']} makes the kernel count, at some cost"


def _steering(pods: list[Document]) -> Iterator[str]:
    """A line for each state in which inbound connections pass by a proxy, with the pods that are in it."""
    for state in filter(lambda each: each.is_open, Steering):
        if names := [each["pod"] for each in pods if each["steering"] == state]:
            yield f"inbound: {state.words} ({len(names)} of {len(pods)} pods: {', '.join(names)})"


def _strays(pods: list[Document]) -> Iterator[str]:
    """A line for each pod with stray processes, and one for each reason why it is not known whether there are any."""
    for pod in pods:
        if told := told_of([Stray(**each) for each in pod["processes"]["strays"]]):
            yield f"processes: {pod['pod']}: {told}"
    reasons = Counter(pod["processes"]["unknown"] for pod in pods if pod["processes"]["unknown"])
    yield from (f"processes: {NOT_KNOWN}: {reason} ({count} of {len(pods)} pods)" for reason, count in reasons.items())


def _sidecars(told: Document) -> Iterator[str]:
    """Lines about pods with a sidecar that are not sidestep's, or not sidestep's alone."""
    if told["captured_twice"]:
        names = ", ".join(told["captured_twice"])
        yield f"istio-cni: its rules are in pods that sidestep captures, whose connections are LOST: {names}"
    elif told["captured_twice"] is None:
        yield "istio-cni: whether its rules are in enrolled pods can't be seen"
    if told["unknown"]:
        yield f"other pods with a sidecar: not known: {told['unknown']}"
    elif left := told["left_out"]:
        yield f"other pods with a sidecar: {len(left)} of this node, NOT captured by sidestep"
        yield from (f"  {each['pod']}: {each['reason']}" for each in left)


def _lost(pods: list[Document]) -> Iterator[str]:
    """A line about captured connections whose original destination got lost, if there were any."""
    if losers := [each for each in pods if each["lost_handovers"]]:
        names = ", ".join(f"{each['pod']} {each['lost_handovers']}" for each in losers)
        yield f"hand-overs: captured connections reached their proxy WITHOUT original destination: {names}"


def _level(told: Document) -> str:
    level = told["level"] if told["level"] == told["wanted"] else f"{told['level']} instead of {told['wanted']}"
    return f"{level}{told['reason'] and ' (' + told['reason'] + ')'}"


def _attached(document: Document) -> str:
    """Where the programs are attached, or that some are not. The table says which."""
    if document["problem"]:
        return f"{'' if document['attached'] is None else 'NOT attached: '}{document['problem']}"
    if not document["attached"]:
        return f"NOT attached at {_places(document) or 'any cgroup'}; run `sidestep attach` (or start the agent)"
    other = "" if document["current"] else ", of another version; `sidestep attach` (or the agent's start) swaps them"
    return f"attached at {_places(document)}{other}"


def _places(document: Document) -> str:
    """The cgroups that the programs are for."""
    return " and ".join(filter(None, (document["attach_point"], *document["further_places"])))


def _entry(entry: Document) -> str:
    place = f"{entry['file']}: " if entry["file"] else ""
    others = [each for each in entry["found_in"] if each != entry["file"]]
    return f"{place}{entry['fault'] or 'entry in place'}{'; also in ' * bool(others)}{', '.join(others)}"


def _agent(agent: Document) -> str:
    who = f"process {agent['pid']}" if agent["pid"] else "agent"
    version = f" (version {agent['version']})" if agent["version"] else ""
    if agent["fault"]:
        return f"{agent['socket']}: {agent['fault']}" + (f"; {who}{version} listens" if agent["pid"] else "")
    return f"{who}{version} answers at {agent['socket']}"


def _readiness(health: Document) -> str:
    if health["fault"]:
        return f"port {health['port']}: {health['fault']}"
    missing = "; ".join(f"{name}: {why}" for name, why in health["missing"].items())
    return "ready" if health["ready"] else f"NOT ready: {missing}"


def _program(each: Document) -> list[Any]:
    seconds = None if each["run_seconds"] is None else f"{each['run_seconds']:.6f}"
    return [each["hook"], each["id"], each["attached"], each["loaded_at"], each["bytes"], each["runs"], seconds]
