"""`sidestep status`: the state of this node as plain values, with or without a running agent."""

import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

from bpf.acceleration import NodeLevel, level_of
from bpf.attachment import is_attached
from bpf.compiler import sources_digest
from bpf.errors import KernelRefused, SidestepError
from bpf.extras import EXTRAS
from bpf.kernel import on_node
from bpf.layout import BuildEntry, Cookie, Level, PodEntry, PodFlags, Quad, TrafficEntry
from bpf.pins import OtherVersion, Pins
from bpf.places import further_places
from bpf.tables import Tables, entries
from bpf.takeover import kept_by_others
from cni.enrolment.bystanders import rules_in
from cni.enrolment.entries import Identity
from cni.enrolment.steered import Steering, steering_of
from cni.enrolment.strays import processes_of
from cni.netns.namespaces import NoProcfs
from installer import VERSION
from installer.commands.maps.listing import maps_of
from installer.commands.pods import enrolled_pods
from installer.commands.pods.ambient_mode import AmbientMode, ambient_mode
from installer.commands.pods.differences import described, is_ending, misspelt_in
from installer.commands.pods.namespace import looks_into
from installer.commands.pods.not_enrolled import left_out
from installer.commands.pods.pod_state import SHADOW, state_of
from installer.commands.pods.proxy_state import proxy_state
from installer.commands.pods.refused import refused_pods
from installer.commands.status.agent_health import agent_of
from installer.commands.status.chain_entry import chain_of
from installer.commands.status.program_runs import HOW_TO_COUNT, counts_runs, programs_of
from installer.settings import Attachment, Chain, Node, Ports, Shadow
from installer.verdict.node import verdict_on

# what is done without each extra of the kernel
_WITHOUT = {each.name: each.without for each in EXTRAS}


def status_document(attachment: Attachment, chain: Chain, node: Node, ports: Ports, shadow: Shadow) -> dict[str, Any]:
    """The whole status, with the verdict. If the kernel's side can't be read, `problem` says why; else it is ""."""
    try:
        kernel = status_of(attachment.pins, node.proc)
    except OtherVersion as error:
        kernel = _unknown(attachment, None, str(error))
    except SidestepError as error:
        kernel = _unknown(attachment, False, str(error))
    agent = agent_of(node, ports)
    ambient = AmbientMode(unknown=agent["fault"]) if agent["fault"] else ambient_mode(node.cni_agent_run_dir)
    for pod in kernel["pods"]:
        pod["state"] = ambient.state_of(pod["uid"], pod["state"])
    looked = {
        "version": VERSION,
        "kernel": platform.release(),
        **kernel,
        "sidecars": _sidecars(kernel, attachment.pins, node),
        "chain": chain_of(chain, node, shadow),
        "agent": agent,
        "ambient": ambient.document(node.ambient_enabled or any(pod["is_ambient"] for pod in kernel["pods"])),
        "refused": refused_pods(node.cni_agent_run_dir).document()
        if not agent["fault"]
        else {"unknown": agent["fault"], "refused": []},
    }
    return {"verdict": verdict_on(looked).document(), **looked}


def status_of(pins: Pins, proc: Path = Path("/proc")) -> dict[str, Any]:
    """The kernel's side, read from the pins and `proc`, a procfs of the node. Raises NotAttached, KernelRefused."""
    pins = pins.look_only()
    pins.require_attached()
    with Tables(pins) as tables:
        node = level_of(tables)
        entered = {key.cookie: pod for key, pod in tables.pods.every()}
        steering, processes = steering_of(pins, tables, entered, proc), processes_of(pins, entered, proc)
        looks = looks_into(enrolled_pods.every(pins, tables), proc)
        proxies = {pod.cookie: proxy_state(pod, inside) for pod, inside in looks}
        pods = [
            _pod(pod, tables.traffic.get(Cookie(cookie)) or TrafficEntry(), node, steering[cookie])
            | {"state": state_of(PodFlags(pod.flags), steering[cookie], processes[cookie], proxies[cookie])}
            | {"proxy": proxies[cookie].document(), "processes": processes[cookie].document()}
            | {"lost_handovers": (tables.lost_handovers.get(Cookie(cookie)) or Quad()).quad}
            for cookie, pod in entered.items()
            if cookie in proxies
        ]
    build = next((value for _, value in entries(pins, "build") if isinstance(value, BuildEntry)), BuildEntry())
    return {
        "attached": is_attached(pins),
        "problem": "",
        "kept_by_others": kept_by_others(pins),
        "attach_point": build.cgroup.decode(),
        "further_places": [str(on_node(place)) for place in further_places(pins) if place.is_dir()],
        "pins": str(pins.root),
        "current": bytes(build.sources) == sources_digest(),
        "lacking": {name: _WITHOUT.get(name, "") for name in build.extras_lacking},
        "acceleration": {"level": str(node.level), "wanted": str(node.wanted), "reason": node.reason},
        "run_counts": {"on": counts_runs(), "how": HOW_TO_COUNT},
        "programs": programs_of(pins),
        "maps": maps_of(pins),
        "pods": sorted(pods, key=lambda each: str(each["pod"])),
        "open_pods": sorted(
            str(each["pod"]) for each in pods if Steering(each["steering"]).is_open and each["state"] != SHADOW
        ),
        "pods_with_strays": sorted(
            str(Identity.of(pod))
            for cookie, pod in entered.items()
            if processes[cookie].is_open and not PodFlags(pod.flags) & PodFlags.SHADOW
        ),
    }


def _sidecars(kernel: dict[str, Any], pins: Pins, node: Node) -> dict[str, Any]:
    """The pods of this node with a sidecar that are not sidestep's, or not sidestep's alone.

    `unknown` says why the Pods can't be read, "" if they can; `captured_twice` is None if it can't be seen, and so is
    `captured_by_nobody`, which has the shadow pods whose rules are gone.
    """
    now = described(node)
    enrolled: list[Identity] = []
    twice: list[str] | None = None
    nobodys: list[str] | None = None
    if not kernel["problem"]:
        with Tables(pins.look_only()) as tables:
            every = {key.cookie: pod for key, pod in tables.pods.every()}
        entered = {cookie: Identity.of(pod) for cookie, pod in every.items()}
        enrolled = list(entered.values())
        shadows = {cookie for cookie, pod in every.items() if PodFlags(pod.flags) & PodFlags.SHADOW}
        with suppress(OSError, NoProcfs):
            ruled = rules_in(entered, node.proc)
            twice = sorted(str(entered[each]) for each in ruled if ruled[each] and each not in shadows)
            nobodys = sorted(str(entered[each]) for each in ruled if not ruled[each] and each in shadows)
    misspelt = {str(each): misspelt_in(now, each) for each in enrolled}
    return {
        "unknown": now.problem,
        "left_out": left_out(enrolled, now, node),
        "ending": sorted(str(each) for each in enrolled if is_ending(now, each)),
        "captured_twice": twice,
        "captured_by_nobody": nobodys,
        "misspelt": {pod: words for pod, words in misspelt.items() if words},
    }


def _unknown(attachment: Attachment, attached: bool | None, problem: str) -> dict[str, Any]:
    """The kernel's side if it cannot be read. The places are those where the programs would be attached."""
    try:
        attach_point, *further = (str(on_node(place)) for place in attachment.choice().every)
    except KernelRefused:
        attach_point, further = "", []
    return {
        "attached": attached,
        "problem": problem,
        "kept_by_others": {},
        "attach_point": attach_point,
        "further_places": further,
        "pins": str(attachment.pins.root),
        "current": False,
        "lacking": {},
        "acceleration": None,
        "run_counts": {"on": counts_runs(), "how": HOW_TO_COUNT},
        "programs": [],
        "maps": [],
        "pods": [],
        "open_pods": [],
        "pods_with_strays": [],
    }


def _pod(pod: PodEntry, traffic: TrafficEntry, node: NodeLevel, steering: Steering) -> dict[str, Any]:
    sums = {name: getattr(traffic, name) for name, *_ in TrafficEntry._fields_}
    return {
        "pod": str(Identity.of(pod)),
        "uid": pod.uid.decode(),
        "is_ambient": bool(pod.flags & PodFlags.AMBIENT),
        "steering": str(steering),
        "acceleration": {"level": str(min(Level(pod.acceleration), node.level)), **sums},
    }
