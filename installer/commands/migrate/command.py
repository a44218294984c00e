"""The command `migrate`."""

import sys

import click

from installer.commands.command import Command
from installer.commands.output import output_option, show
from installer.settings import Chain, Node, take


@click.command(cls=Command)
@click.option("--check", is_flag=True, required=True, help="Only look; nothing is changed.")
@take(Chain)
@take(Node)
@output_option
def migrate(check: bool, chain: Chain, node: Node, output: str) -> None:
    """Look at what istio-cni has left on this node, before sidestep takes its place or gives it back.

    A line for each: Istio's DaemonSet, its entry in the CNI chain, pods that Istio's rules capture, pods that Istio's
    agent holds in ambient mode, and pods whose istio-init container sets up rules. Each says what to do. The exit
    status is 1 if there is anything to do, or if something could not be looked at. The steps of a migration are Helm's
    or istioctl's: docs/migration.md.
    """
    from installer.agent.logs import configure_logging
    from installer.commands.migrate.preflight import preflight
    from installer.settings import Logging

    configure_logging(Logging(log_level="error"))  # the lines themselves report what was found
    found = preflight(chain, node)
    document = {"ready": all(each.is_good for each in found), "findings": [each.document() for each in found]}
    show(document, output, lambda: "".join(f"{each}\n" for each in found))
    sys.exit(0 if document["ready"] else 1)
