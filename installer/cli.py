"""`sidestep …`: exit 0 good, 1 failed with one line on stderr, 2 wrong usage.

The agent's imports are slow and large, so they wait until the command that needs them runs.
"""

import sys
from pathlib import Path

import click

from bpf.attachment import attach as attach_programs
from bpf.attachment import detach as detach_programs
from bpf.errors import SidestepError
from bpf.kernel import require_root
from bpf.pins import Pins
from installer import settings
from installer.settings import Attachment


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Istio sidecar traffic capture at the socket layer: no iptables, no conntrack."""
    require_root()


@cli.command()
@settings.bpffs
@settings.cgroup
def attach(bpffs: Path, cgroup: Path | None) -> None:
    """Compile, load, pin and attach the programs; swap them if the sources changed; else do nothing."""
    where = Attachment.of(bpffs, cgroup)
    outcome = attach_programs(where.pins, where.cgroup)
    click.echo(f"{outcome}: programs at {where.cgroup}, pins in {where.pins.root}")


@cli.command()
@settings.bpffs
def detach(bpffs: Path) -> None:
    """Remove links, programs and maps. Open connections go on, new ones are not captured."""
    found = detach_programs(Pins(bpffs))
    click.echo(f"detached: pins in {bpffs}/sidestep removed" if found else "nothing was attached")


@cli.command()
@settings.bpffs
@settings.cgroup
@settings.run_dir
@settings.pods
@settings.log_level
def agent(bpffs: Path, cgroup: Path | None, run_dir: Path, pods: Path, log_level: str) -> None:
    """Attach, then serve the CNI plugin's requests until stopped. Stopping leaves capture as it is."""
    from installer.agent import run

    run(Attachment.of(bpffs, cgroup), run_dir, pods, log_level)


def main() -> None:
    """The entry point: errors meant for the operator are one line, not a traceback."""
    try:
        cli(prog_name="sidestep")
    except SidestepError as error:
        click.echo(f"sidestep: {error}", err=True)
        sys.exit(1)
