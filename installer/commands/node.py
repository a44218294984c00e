"""The commands of a node's life: probe, agent, uninstall."""

import sys
from typing import Any

import click

from installer.commands.command import Command
from installer.commands.output import output_option, show
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
    take,
)


@click.command(cls=Command)
@take(Attachment)
@take(Node)
@take(Chain)
@take(Repair)
@take(Acceleration)
@take(Coverage)
@take(Following)
@take(Ambient)
@take(Shadow)
@take(Ports)
@take(Logging)
def agent(**groups: Any) -> None:
    """Run this node's agent, which serves the CNI plugin.

    The agent attaches the programs, then serves the plugin's requests until it is stopped. Capture goes on without it.
    """
    from installer.agent.agent import Settings, run_agent

    run_agent(Settings(**groups))


@click.command(cls=Command)
@take(Attachment)
@take(Node)
@take(Chain)
@click.option(
    "--end-capture/--keep-capture",
    default=None,
    help="End the capture of running mesh pods, or leave it and remove only the plugin. Without either, pods that are "
    "captured are named and nothing is removed.",
)
@output_option
def uninstall(attachment: Attachment, node: Node, chain: Chain, end_capture: bool | None, output: str) -> None:
    """Remove sidestep from this node.

    The plugin is taken out of the CNI chain and off the host, and the programs are detached. If mesh pods run, that
    ends their capture, and with it mTLS: open connections go on, new ones go past the proxies. So it needs
    --end-capture.
    """
    from installer.host.uninstall import leave_chain, uninstall_node

    if end_capture is False:
        done = leave_chain(node, chain)
    else:
        done = uninstall_node(attachment, node, chain, bool(end_capture))
    show({"done": done}, output, lambda: "\n".join(done or ["nothing was installed"]) + "\n")


@click.command(cls=Command)
@take(Attachment)
@take(Chain)
@take(Node)
@output_option
def probe(attachment: Attachment, chain: Chain, node: Node, output: str) -> None:
    """Check whether capture will work on this node.

    If it will not, the table says what to do, and the exit status is 1. The check loads the programs and tries them in
    a scratch cgroup and network namespace. Nothing stays behind.
    """
    from installer.probe.examine import examine_programs

    findings = examine_programs(attachment, chain, node)
    show(findings.document(), output, findings.table)
    sys.exit(0 if findings.works else 1)
