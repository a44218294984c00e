"""The command `install-cni`, which Istio's own DaemonSet runs: the agent, with what that DaemonSet gives it.

Whoever has istio-cni from Istio's chart, istioctl or the Sail operator changes one value, the image: docs/migration.md.
"""

from dataclasses import replace
from typing import Any

import click

from bpf.errors import SidestepError
from bpf.kernel import HOST_PROC, ROOT, has_mount, node_root
from installer.commands.command import Command
from installer.settings import (
    Acceleration,
    Attachment,
    Chain,
    Coverage,
    Following,
    Logging,
    Node,
    Ports,
    Repair,
    Shadow,
    take,
)

# Istio's levels (pkg/log), and ours
_LEVELS = {"debug": "debug", "info": "info", "warn": "warn", "error": "error", "fatal": "error", "none": "error"}
# Istio's scopes that speak of the agent: the first that is given counts
_SCOPES = ("cni-agent", "all", "default")


class _ScopedLevel(click.ParamType[str]):
    """A level, or levels of Istio's scopes: `info`, `default:info,cni-agent:debug`."""

    name = "levels"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        given = {}
        for each in value.split(","):
            scope, _, level = each.strip().rpartition(":")
            if level not in _LEVELS:
                words = ", ".join(_LEVELS)
                self.fail(f'"{each}" has no level; give one of {words}, or SCOPE:LEVEL,SCOPE:LEVEL', param, ctx)
            given[scope or "default"] = _LEVELS[level]
        return next((given[scope] for scope in _SCOPES if scope in given), "info")


@click.command("install-cni", cls=Command)
# Istio's DaemonSet keeps its `command` if the manifests of this repository are applied over it
@click.argument("agent", required=False, type=click.Choice(["agent"]), metavar="")
@click.option("--log_output_level", "output_level", type=_ScopedLevel(), help="Istio's log levels, by scope.")
@click.option("--log_as_json", "as_json", is_flag=True, help="One JSON object a line.")
@take(Attachment)
@take(Node)
@take(Chain)
@take(Repair)
@take(Acceleration)
@take(Coverage)
@take(Following)
@take(Shadow)
@take(Ports)
@take(Logging)
def install_cni(
    agent: str | None,
    output_level: str | None,
    as_json: bool,
    attachment: Attachment,
    chain: Chain,
    logging: Logging,
    node: Node,
    **groups: Any,
) -> None:
    """Run this node's agent in Istio's own DaemonSet, in place of istio-cni's.

    It takes the arguments and the environment that Istio's chart gives to install-cni, and installs the plugin. The
    node's bpffs and cgroups are reached through the node's first process, /host/proc/1/root.
    """
    if node.ambient_enabled:
        raise SidestepError(
            "AMBIENT_ENABLED is true, but in Istio's DaemonSet sidestep captures for sidecars only; for ambient mode "
            "use sidestep's own chart with ambient.enabled=true, or leave istio-cni its own image. For sidecars only, "
            "set ambient.enabled=false (with istioctl values.cni.ambient.enabled=false)"
        )
    _require_node(attachment)
    from installer.agent.agent import Settings, run_agent

    logging = Logging(output_level or logging.log_level, as_json or logging.log_as_json)
    everything = {"attachment": attachment, "chain": replace(chain, install=True), "logging": logging, **groups}
    run_agent(Settings(**everything, node=node, is_in_istios_daemonset=True))


def _require_node(attachment: Attachment) -> None:
    """Raise SidestepError with the value to set if the node's file systems can't be reached."""
    if node_root() != ROOT or has_mount(attachment.bpffs, "bpf"):
        return
    if not (HOST_PROC / "self").exists():
        raise SidestepError(
            f"{HOST_PROC} is not mounted, and only through it the node's bpffs and cgroups can be reached; set "
            "repair.repairPods=true (with istioctl values.cni.repair.repairPods=true), by which Istio's chart mounts it"
        )
    raise SidestepError(
        f"{HOST_PROC}/1/root can't be looked into, and only through it the node's bpffs and cgroups can be reached; "
        "add SYS_PTRACE to the container's capabilities, as Istio's chart does"
    )
