"""The command `bugreport`."""

import platform
import sys
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import click

from installer.commands.command import Command
from installer.settings import Attachment, Chain, Node, Ports, environment_variable, take


@click.command(cls=Command)
@take(Attachment)
@take(Chain)
@take(Node)
@take(Ports)
def bugreport(attachment: Attachment, chain: Chain, node: Node, ports: Ports) -> None:
    """Print an archive with all that is known of this node, for whoever looks into a fault.

    \b
        sidestep bugreport > report.tar.gz
        kubectl sidestep on NODE bugreport > report.tar.gz

    It has what the commands tell, the agent's last log lines, metrics, and the CNI configuration without secrets.
    README.txt in it says what each file is. What can't be had says why in its place.
    """  # noqa: D301 (after \b, click keeps a paragraph's line breaks)
    from installer.commands.bugreport.archive import archive
    from installer.commands.bugreport.parts import parts

    if sys.stdout.isatty():
        raise click.UsageError("this prints an archive; send it to a file: sidestep bugreport > report.tar.gz")
    settings = dict(_settings(attachment, chain, node, ports))
    made = archive(node.kubernetes_node_name or platform.node(), parts(settings, node, chain, ports))
    sys.stdout.buffer.write(made)


def _settings(*groups: Any) -> Iterator[tuple[str, str]]:
    """The settings as the environment has them. Those that are empty are left to their defaults."""
    for group in groups:
        for each in fields(group):
            value = getattr(group, each.name)
            if isinstance(value, tuple):
                value = ",".join(value)
            if value not in (None, ""):
                yield environment_variable(each), str(value)
