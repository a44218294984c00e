"""The kernel's side alone: attach, detach, accelerate."""

import click

from bpf.layout import LEVELS
from installer.settings import Attachment, Node, take


@click.command()
@take(Attachment)
def attach(attachment: Attachment) -> None:
    """Compile, load, pin and attach the programs; swap them if the sources changed; else do nothing."""
    from bpf.attachment import attach as attach_programs

    cgroup = attachment.attach_point()
    outcome = attach_programs(attachment.pins, cgroup)
    click.echo(f"{outcome}: programs at {cgroup}, pins in {attachment.pins.root}")


@click.command()
@take(Attachment)
def detach(attachment: Attachment) -> None:
    """Remove links, programs and maps. Open connections go on, new ones are not captured."""
    from bpf.attachment import detach as detach_programs

    found = detach_programs(attachment.pins)
    click.echo(f"detached: pins in {attachment.pins.top} removed" if found else "nothing was attached")


@click.command()
@take(Attachment)
@take(Node)
@click.argument("level", type=click.Choice(list(LEVELS)))
def accelerate(attachment: Attachment, node: Node, level: str) -> None:
    """Change the node's level of acceleration now, until the agent starts again.

    Connections under way go on: what they send takes the other path from now on. New ones are made at the new level.
    """
    from bpf.tables import Tables
    from installer.acceleration.level import Acceleration

    with Tables(attachment.pins) as tables:
        keeper = Acceleration(attachment.pins, tables, attachment.attach_point(), node.cni_agent_run_dir)
        made = keeper.settle(LEVELS[level])
    click.echo(f"acceleration: {made.level}" + (f" ({made.reason})" if made.reason else ""))
