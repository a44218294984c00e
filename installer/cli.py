"""`sidestep …`: exit 0 good, 1 failed with one line on stderr, 2 wrong usage.

The agent's imports are slow and large, so they wait until the command that needs them runs.
"""

import json
import sys
from typing import Any

import click

from bpf.attachment import attach as attach_programs
from bpf.attachment import detach as detach_programs
from bpf.errors import SidestepError
from bpf.kernel import require_root
from bpf.layout import LEVELS
from installer.settings import Acceleration, Attachment, Chain, Logging, Node, Ports, Repair, take

_output = click.option(
    "--output",
    type=click.Choice(["table", "json", "yaml"]),
    default="table",
    show_default=True,
    help="How it is printed.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def cli(context: click.Context) -> None:
    """Istio sidecar traffic capture at the socket layer: no iptables, no conntrack."""
    if context.invoked_subcommand != "probe":  # whose table says it among other things
        require_root()


@cli.command()
@take(Attachment)
def attach(attachment: Attachment) -> None:
    """Compile, load, pin and attach the programs; swap them if the sources changed; else do nothing."""
    cgroup = attachment.attach_point()
    outcome = attach_programs(attachment.pins, cgroup)
    click.echo(f"{outcome}: programs at {cgroup}, pins in {attachment.pins.root}")


@cli.command()
@take(Attachment)
def detach(attachment: Attachment) -> None:
    """Remove links, programs and maps. Open connections go on, new ones are not captured."""
    found = detach_programs(attachment.pins)
    click.echo(f"detached: pins in {attachment.pins.top} removed" if found else "nothing was attached")


@cli.command()
@take(Attachment)
@take(Node)
@take(Chain)
@take(Repair)
@take(Acceleration)
@take(Ports)
@take(Logging)
def agent(**groups: Any) -> None:
    """Attach, then serve the CNI plugin's requests until stopped. Stopping leaves capture as it is."""
    from installer.agent import Settings, run

    run(Settings(**groups))


@cli.command()
@take(Attachment)
@take(Node)
@take(Chain)
def uninstall(attachment: Attachment, node: Node, chain: Chain) -> None:
    """Take the plugin out of the chain and off the host, detach the programs. Open connections go on."""
    from installer.host.uninstall import uninstall

    done = uninstall(attachment, node, chain)
    click.echo("\n".join(done) if done else "nothing was installed")


@cli.command()
@take(Attachment)
@take(Node)
@click.argument("level", type=click.Choice(list(LEVELS)))
def accelerate(attachment: Attachment, node: Node, level: str) -> None:
    """Change the node's level of acceleration now, until the agent starts again.

    Connections under way go on: what they send takes the other path from now on. New ones are made at the new level.
    """
    from bpf.tables import Tables
    from installer.acceleration.level import Acceleration as Keeper

    with Tables(attachment.pins) as tables:
        keeper = Keeper(attachment.pins, tables, attachment.attach_point(), node.cni_agent_run_dir)
        made = keeper.settle(LEVELS[level])
    click.echo(f"acceleration: {made.level}" + (f" ({made.reason})" if made.reason else ""))


@cli.command()
@take(Attachment)
@_output
def status(attachment: Attachment, output: str) -> None:
    """Show what is attached, the level of acceleration and why, and what it does for each pod."""
    from installer.status import status_of, table_of

    document = status_of(attachment.pins)
    click.echo(table_of(document) if output == "table" else _written(document, output), nl=False)


@cli.command()
@take(Attachment)
@take(Chain)
@take(Node)
@_output
def probe(attachment: Attachment, chain: Chain, node: Node, output: str) -> None:
    """Say whether capture will work on this node, and if not what to do: exit status 0 only if it will.

    Program types, helpers and maps are tried in a scratch cgroup and network namespace; nothing stays behind.
    """
    from installer.probe import examine_programs

    findings = examine_programs(attachment, chain, node)
    click.echo(findings.table() if output == "table" else _written(findings.document(), output), nl=False)
    sys.exit(0 if findings.works else 1)


def _written(document: dict[str, Any], output: str) -> str:
    if output == "json":
        return json.dumps(document, indent=2) + "\n"
    import yaml

    return str(yaml.safe_dump(document, sort_keys=False))


def main() -> None:
    """The entry point: errors meant for the operator are one line, not a traceback."""
    try:
        cli(prog_name="sidestep")
    except SidestepError as error:
        click.echo(f"sidestep: {error}", err=True)
        sys.exit(1)
