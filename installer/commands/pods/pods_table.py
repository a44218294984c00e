"""The documents of `sidestep pods` as text for people."""

from collections.abc import Iterator
from typing import Any

from cni.enrolment.steered import Steering
from cni.enrolment.strays import NOT_KNOWN, STRAYS, Stray
from installer.commands.pods.differences import is_different, uncompared
from installer.commands.pods.let_past import LetPast
from installer.commands.pods.pod_state import PENDING
from installer.commands.pods.refused import Refused

_WITH_SIDECAR = "has a sidecar and is not captured"
_BRIEF = ("namespace", "name", "state", "captured", "refused")
_VERDICTS = (*_BRIEF[3:], "direct")
_WIDE = (*_BRIEF, "direct", "address", "strays", "proxy", "inbound", "Pod now")
_NUMBERS = (*_VERDICTS, "strays")


def pods_table(
    documents: list[dict[str, Any]],
    others: tuple[LetPast, Refused] | None,
    is_wide: bool = False,
    has_titles: bool = True,
) -> str:
    """One line a pod. Below: why pods of the mesh are not enrolled, then the pods that only the agent knows.

    `others` are the latter; None if nobody wants to know. Without titles there is nothing below the rows.
    """
    from installer.commands.printing import line, rendered, table

    enrolled = [each for each in documents if "steering" in each]
    left = [each for each in documents if "steering" not in each]
    below = _left_out(left)
    if others:
        passed, refused = others
        below += [*_refused(refused), *passed.lines(each["pod"] for each in left)]
    if not documents and not has_titles:
        return ""
    if not documents:
        return rendered(*map(line, ["no pods are enrolled", *below]))
    titles = _WIDE if is_wide else _BRIEF
    rows = [_row(each)[: len(titles)] for each in documents]
    shown = rendered(table(titles, rows, set(titles) - set(_NUMBERS), has_titles)).rstrip("\n") + "\n"
    if not has_titles:
        return shown
    lines = list(_reasons(enrolled))
    if reason := uncompared(enrolled):
        lines.append(reason)
    elif changed := [each["pod"] for each in enrolled if is_different(each["differs"])]:
        lines.append(f"Pods that ask for something else by now (`sidestep pods NAME` shows it): {', '.join(changed)}")
    lines += [f"{each['pod']}: {each['acceleration']['warning']}" for each in enrolled if _is_warned(each)]
    return shown + (rendered(*map(line, [*lines, *below])) if lines or below else "")


def _row(each: dict[str, Any]) -> tuple[Any, ...]:
    """A pod's cells. If it is not enrolled, nothing is counted."""
    name = each["namespace"], each["name"], each["state"]
    address = next(iter(each["addresses"]), "none")
    if "steering" not in each:
        return *name, *(None for _ in _VERDICTS), address, *(None for _ in range(4))
    sums = (_sum(each, verdict) for verdict in _VERDICTS)
    return *name, *sums, address, _strays(each["processes"]), each["proxy"]["state"], each["steering"], _state(each)


def _is_warned(document: dict[str, Any]) -> bool:
    return bool(document["acceleration"]["warning"])


def _reasons(enrolled: list[dict[str, Any]]) -> Iterator[str]:
    """Why states are unknown: a line for each reason, with its pods."""
    by_reason: dict[str, list[str]] = {}
    for each in enrolled:
        if each["reason"]:
            by_reason.setdefault(each["reason"], []).append(each["pod"])
    for reason, pods in by_reason.items():
        yield f"{reason}: {', '.join(pods)}; `sidestep status` says what to do"


def _left_out(left: list[dict[str, Any]]) -> list[str]:
    words = {PENDING: "is not in the mesh yet"}
    return [f"{each['pod']} {words.get(each['state'], _WITH_SIDECAR)}: {each['reason']}" for each in left]


def _refused(refused: Refused) -> list[str]:
    count = len(refused.pods)
    return [f"refused by the agent, so they don't start: {count}; `sidestep pods --refused` shows why"] if count else []


def _sum(document: dict[str, Any], verdict: str) -> int:
    """The sum over all directions. Denied connections count as refused."""
    counted = (verdict, "denied") if verdict == "refused" else (verdict,)
    return sum(counts.get(each, 0) for counts in document["connections"].values() for each in counted)


def _strays(processes: dict[str, Any]) -> str:
    """The number of stray processes; with a question mark if there may be more."""
    return f"{len(processes['strays'])}{'?' if processes['unknown'] else ''}"


def _state(document: dict[str, Any]) -> str:
    if not document["differs"]["known"]:
        return "not known"
    return "different" if is_different(document["differs"]) else "the same"


def pod_text(document: dict[str, Any]) -> str:
    """Everything about one pod."""
    lines = [f"{document['pod']} (uid {document['uid'] or 'not known'})"]
    how = "while it ran" if document["is_adopted"] else f"through {document['network']}, {document['interface']}"
    lines += _section("enrolled", [f"{how}; netns cookie {document['netns_cookie']}"])
    state, reason = document["state"], document["reason"]
    lines += _section("state", [f"{state}: {reason.removeprefix(f'{state}: ')}" if reason else state])
    lines += _section("inbound", [Steering(document["steering"]).words])
    ipv6 = "IPv6 is captured" if document["captures_ipv6"] else "IPv6 is not captured"
    lines += _section("addresses", [f"{', '.join(document['addresses'])}; {ipv6}"])
    lines += _section("policy", list(_policy(document["policy"])))
    lines += _section("processes", _processes(document["processes"]))
    lines += _section("proxy", [document["proxy"]["words"]])
    lines += _section("listeners", _listeners(document["listeners"]))
    lines += _section("connections", _connections(document["connections"]))
    if lost := document["lost_handovers"]:
        lines += _section("", [f"{lost} captured connections reached the proxy WITHOUT their original destination"])
    lines += _section("acceleration", _acceleration(document["acceleration"]))
    lines += _section("Pod now", [*document["misspelt"], *_differs(document["differs"])])
    return "\n".join(lines) + "\n"


def _section(title: str, lines: list[str]) -> list[str]:
    return [f"  {title if number == 0 else '':14}{line}" for number, line in enumerate(lines)]


def _policy(policy: dict[str, Any]) -> list[str]:
    """One line for each setting. Those that are not the default come first."""
    words = policy["annotations"] | {f"istio-proxy {name}": value for name, value in policy["proxy"].items()}
    defaults = {name if name in policy["annotations"] else f"istio-proxy {name}" for name in policy["defaults"]}
    order = sorted(words, key=lambda name: name in defaults)
    return [f'{name}: "{words[name]}"{" (default)" if name in defaults else ""}' for name in order]


def _processes(processes: dict[str, Any]) -> list[str]:
    """How many processes the programs see, then the stray ones."""
    lines = [f"{processes['captured']} where the programs are attached"]
    if strays := processes["strays"]:
        lines += [f"{STRAYS}:", *(f"  {Stray(**each)}" for each in strays)]
    return [*lines, *([f"{NOT_KNOWN}: {processes['unknown']}"] if processes["unknown"] else [])]


def _listeners(listeners: dict[str, Any]) -> list[str]:
    count = listeners["steered_to"]
    lines = [f"{count} of the proxy's sockets get inbound connections"]
    if listeners["listening"] is None:
        lines.append("its network namespace is not found, so its listeners are not known")
    for port, addresses in (listeners["listening"] or {}).items():
        lines.append(f"port {port}: {_counted(addresses)}")
    if "proxy_has_started" in listeners:
        lines.append(f"early outbound {'is over' if listeners['proxy_has_started'] else 'goes on: everything passes'}")
    if "late_outbound" in listeners:
        lines.append(f"late outbound {listeners['late_outbound']}")
    if "proxy_cgroup" in listeners:
        cgroup = listeners["proxy_cgroup"]
        lines.append(f"the proxy's container {'is not known yet' if cgroup is None else f'is in cgroup {cgroup}'}")
    return lines


def _counted(addresses: list[str]) -> str:
    each = dict.fromkeys(addresses)
    told = [f"{ip} ({addresses.count(ip)} sockets)" if addresses.count(ip) > 1 else ip for ip in each]
    return ", ".join(told) or "nobody"


def _connections(connections: dict[str, dict[str, int]]) -> list[str]:
    return [
        f"{direction}: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}"
        for direction, counts in connections.items()
    ]


def _acceleration(found: dict[str, Any]) -> list[str]:
    lines = [f"{found['level']}: the pod allows {found['allowed']}, the node {found['node']}"]
    sums = f"{found['redirected']} messages ({found['redirected_bytes']} bytes) redirected"
    passed = f"{found['undrained']} undrained, {found['over_budget']} over budget, {found['no_peer']} without peer"
    lines.append(f"{sums}; passed to TCP: {passed}")
    return [*lines, f"WARNING: {found['warning']}"] if found["warning"] else lines


def _differs(found: dict[str, Any]) -> list[str]:
    lines = [
        f'{each["name"]}: "{each["now"]}", enrolled as "{each["enrolled"]}" ({each["applies"]})'
        for each in found["changes"]
    ]
    return [*lines, found["reason"]] if found["reason"] else ["asks for the same"]
