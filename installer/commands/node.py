"""A node's life: probe, agent, uninstall."""

import sys
from typing import Any

import click

from installer.commands.output import output_option, show
from installer.settings import Acceleration, Attachment, Chain, Logging, Node, Ports, Repair, take


@click.command()
@take(Attachment)
@take(Node)
@take(Chain)
@take(Repair)
@take(Acceleration)
@take(Ports)
@take(Logging)
def agent(**groups: Any) -> None:
    """Attach, then serve the CNI plugin's requests until stopped. Stopping leaves capture as it is."""
    from installer.agent.agent import Settings, run_agent

    run_agent(Settings(**groups))


@click.command()
@take(Attachment)
@take(Node)
@take(Chain)
@output_option
def uninstall(attachment: Attachment, node: Node, chain: Chain, output: str) -> None:
    """Take the plugin out of the chain and off the host, detach the programs. Open connections go on."""
    from installer.host.uninstall import uninstall_node

    done = uninstall_node(attachment, node, chain)
    show({"done": done}, output, lambda: "\n".join(done or ["nothing was installed"]) + "\n")


@click.command()
@take(Attachment)
@take(Chain)
@take(Node)
@output_option
def probe(attachment: Attachment, chain: Chain, node: Node, output: str) -> None:
    """Say whether capture will work on this node, and if not what to do: exit status 0 only if it will.

    The programs are loaded, and tried in a scratch cgroup and network namespace; nothing stays behind.
    """
    from installer.probe.examine import examine_programs

    findings = examine_programs(attachment, chain, node)
    show(findings.document(), output, findings.table)
    sys.exit(0 if findings.works else 1)
