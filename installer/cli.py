"""`sidestep …`: exit 0 good, 1 failed with one line on stderr, 2 wrong usage.

The agent's imports are slow and large, so they wait until the command that needs them runs.
"""

import json
import sys

import click

from bpf.attachment import attach as attach_programs
from bpf.attachment import detach as detach_programs
from bpf.errors import SidestepError
from bpf.kernel import require_root
from installer.settings import Attachment, Chain, Logging, Node, Ports, Repair, take


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
@take(Ports)
@take(Logging)
def agent(attachment: Attachment, node: Node, chain: Chain, repair: Repair, ports: Ports, logging: Logging) -> None:
    """Attach, then serve the CNI plugin's requests until stopped. Stopping leaves capture as it is."""
    from installer.agent import Settings, run

    run(Settings(attachment, node, chain, repair, ports, logging))


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
@take(Chain)
@take(Node)
@click.option(
    "--output",
    type=click.Choice(["table", "json", "yaml"]),
    default="table",
    show_default=True,
    help="How the findings are printed.",
)
def probe(attachment: Attachment, chain: Chain, node: Node, output: str) -> None:
    """Say whether capture will work on this node, and if not what to do: exit status 0 only if it will.

    Program types, helpers and maps are tried in a scratch cgroup and network namespace; nothing stays behind.
    """
    from installer.probe import examine_programs

    findings = examine_programs(attachment, chain, node)
    if output == "table":
        click.echo(findings.table(), nl=False)
    elif output == "json":
        click.echo(json.dumps(findings.document(), indent=2))
    else:
        import yaml

        click.echo(yaml.safe_dump(findings.document(), sort_keys=False), nl=False)
    sys.exit(0 if findings.works else 1)


def main() -> None:
    """The entry point: errors meant for the operator are one line, not a traceback."""
    try:
        cli(prog_name="sidestep")
    except SidestepError as error:
        click.echo(f"sidestep: {error}", err=True)
        sys.exit(1)
