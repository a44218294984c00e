"""The status of a node for people: the verdict, then a line for each part; programs, maps and pods as tables."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.text import Text

from installer.commands.maps.maps_table import maps_table
from installer.commands.printing import line, rendered, table
from installer.verdict.node import verdict_on
from installer.verdict.verdict import Finding, State

Document = dict[str, Any]

_PROGRAMS = ("program", "id", "attached", "loaded at", "bytes", "runs", "seconds")
_PODS = ("pod", "state", "level", "redirected", "bytes", "undrained", "over budget", "no peer")
_TEXTS = ("program", "pod", "state", "level", "loaded at")  # all other columns are numbers, aligned right
_MARKS = {State.WRONG: "✗", State.UNKNOWN: "?", State.NOTE: "·"}


def status_table(document: Document, is_verbose: bool) -> str:
    """The whole status. The tables of programs, maps and pods are only there if it `is_verbose`."""
    told = [*_verdict(document), Text(""), *map(line, _lines(document, is_verbose))]
    if document["problem"] or not is_verbose:
        return rendered(*told)
    programs = (_program(each) for each in document["programs"])
    pods = ([each["pod"], each["state"], *each["acceleration"].values()] for each in document["pods"])
    return rendered(*told, table(_PROGRAMS, programs, _TEXTS), maps_table(document["maps"]), table(_PODS, pods, _TEXTS))


def _verdict(document: Document) -> Iterator[Text]:
    """The verdict, then what was found. Findings with the same remedy stand together above it."""
    verdict = verdict_on(document)
    yield Text(verdict.headline)
    for group, advice in verdict.advised():
        yield from (line(_told(each), f"{_MARKS[each.state]} ", "  ") for each in group)
        if advice:
            yield line(advice, "  → ", "    ")


def _told(finding: Finding) -> str:
    return f"{finding.part}: {finding.what}"


def _lines(document: Document, is_verbose: bool) -> Iterator[str]:
    yield f"sidestep {document['version']}, kernel {document['kernel']}"
    yield f"programs: {_attached(document)}"
    for layout, pods in document["kept_by_others"].items():
        names = ", ".join(pods) or "none"
        yield f"programs: another version's ({layout}) are attached too; pods that are not taken over: {names}"
    if document["problem"]:
        yield f"attach point: {_places(document) or 'none, because cgroup2 is not mounted'}"
    else:
        yield f"pods: {len(document['pods'])} enrolled; `sidestep pods` lists them"
    for name, instead in document["lacking"].items():
        yield f"kernel: without {name}{instead and ': '}{instead}"
    if told := document["acceleration"]:
        yield f"acceleration: {_level(told)}"
    yield from _chain(document)
    yield f"agent: {_agent(document['agent'])}"
    yield f"readiness: {_readiness(document['agent']['health'])}"
    yield f"ambient mode: {_ambient(document['ambient'])}"
    if is_verbose and not (document["problem"] or document["run_counts"]["on"]):
        yield f"runs of programs: not counted; {document['run_counts']['how']} makes the kernel count, at some cost"


def _chain(document: Document) -> Iterator[str]:
    """Lines about the plugin and its entry. If this agent does not install them, only what is there all the same."""
    chain = document["chain"]
    plugin, entry = chain["plugin"], chain["entry"]
    if not (chain["is_ours"] or entry["found_in"]):
        yield "plugin and chain: not installed by this agent"
        return
    yield f"plugin: {plugin['file']}: {plugin['fault'] or 'as in this version'}"
    yield f"chain: {_entry(entry)}"
    for remark in (*filter(None, (entry["rival"],)), *entry["remarks"]):
        yield f"chain: {remark}"
    if document["pods"] and not entry["found_in"]:
        count = len(document["pods"])
        yield f"chain: new pods are not captured by sidestep; {count} running pods stay captured until they end"


def _level(told: Document) -> str:
    level = told["level"] if told["level"] == told["wanted"] else f"{told['level']} instead of {told['wanted']}"
    return f"{level}{told['reason'] and ' (' + told['reason'] + ')'}"


def _attached(document: Document) -> str:
    """Where the programs are attached, or that some are not."""
    if document["problem"]:
        return f"{'' if document['attached'] is None else 'NOT attached: '}{document['problem']}"
    if not document["attached"]:
        return f"NOT attached at {_places(document) or 'any cgroup'}"
    return f"attached at {_places(document)}{'' if document['current'] else ', of another version'}"


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


def _ambient(told: Document) -> str:
    """Whether it is on, the ztunnels, and how many pods are in the mesh and how many should be."""
    if told["is_on"] is None:
        return f"not known: {told['unknown']}"
    if not told["is_on"]:
        return "off"
    count = Counter(each["state"] for each in told["pods"])
    ztunnels = {0: "no ztunnel is connected", 1: "one ztunnel is connected"}
    connected = ztunnels.get(told["ztunnels"], f"{told['ztunnels']} ztunnels are connected")
    return f"on; {connected}; pods: {count['ambient']} in the mesh, {count['pending']} pending"


def _program(each: Document) -> list[Any]:
    seconds = None if each["run_seconds"] is None else f"{each['run_seconds']:.6f}"
    return [each["hook"], each["id"], each["attached"], each["loaded_at"], each["bytes"], each["runs"], seconds]
