"""Pods as the cluster knows them: on which node they are, and where they are reached."""

import re
from dataclasses import dataclass
from ipaddress import ip_address

import click

from installer.kubectl.kubectl import Kubectl

# [namespace/]name[:port], as `sidestep explain` takes it
_POD = re.compile(r"((?:[a-z0-9][a-z0-9.-]*/)?[a-z0-9][a-z0-9.-]*)(?::(\d+))?")


@dataclass(frozen=True)
class Whereabouts:
    """One pod's; `pod` is NAMESPACE/NAME."""

    pod: str
    node: str
    address: str


def find_pod(kubectl: Kubectl, pod: str, namespace: str) -> Whereabouts:
    """By NAME, then in `namespace`, or NAMESPACE/NAME. Raises KubectlFailed, ClickException if it is on no node yet."""
    where, slash, name = pod.rpartition("/")
    where = where if slash else namespace
    found = kubectl.one("pod", name, "--namespace", where)
    node = found["spec"].get("nodeName")
    if not node:
        raise click.ClickException(f"{where}/{name} is on no node yet")
    return Whereabouts(f"{where}/{name}", node, found["status"].get("podIP", ""))


def named_pod(argument: str) -> tuple[str, str] | None:
    """The pod and the port ("" if there is none) that an argument names; None if it is an address or an option."""
    found = _POD.fullmatch(argument)
    if found is None:
        return None
    try:
        ip_address(found[1])
    except ValueError:
        return found[1], found[2] or ""
    return None


def in_url(address: str) -> str:
    """An address as it stands before a port."""
    return f"[{address}]" if ":" in address else address
