"""The commands for the kernel's side alone: attach, detach, accelerate."""

from pathlib import Path

import click

from bpf.layout import LEVELS
from installer.commands.command import Command
from installer.commands.output import output_option, show
from installer.settings import Attachment, Node, take, take_one


@click.command(cls=Command)
@take(Attachment)
@take_one(Node, "proc")
@output_option
def attach(attachment: Attachment, proc: Path, output: str) -> None:
    """Load, pin and attach the BPF programs.

    They are compiled first, unless their bytecode is kept: in the directory that SIDESTEP_BYTECODE names, by default
    /run/sidestep/bytecode.

    If programs from other sources are attached, they are swapped in place. If the same programs are attached, only what
    somebody has removed is restored: pins, links, and the inbound steering of pods. Programs of a version with other
    maps stay until an agent of this version has taken over their pods.
    """
    from bpf.attachment import places_of
    from bpf.covering import attach_where_pods_are
    from bpf.errors import SidestepError
    from bpf.holder import holder_of, is_held
    from bpf.retained import missing_pins
    from bpf.tables import Tables
    from cni.enrolment.steered import steer_again

    pins = attachment.pins
    if is_held(pins) and not pins.root.exists():
        raise SidestepError(f"an agent of another version uses these pins: {holder_of(pins)}; stop it first")
    choice = attachment.choice()
    missing = missing_pins(pins) if pins.root.is_dir() else []
    outcome = attach_where_pods_are(pins, choice)
    with Tables(pins) as tables:
        steered = [f"the steering of {name}" for name in steer_again(pins, tables, proc)]
    restored = [each for each in missing if each not in missing_pins(pins)] + steered
    first, *further = (str(place) for place in places_of(pins))
    document = {
        "outcome": str(outcome),
        "attach_point": first,
        "further_places": further,
        "pins": str(pins.root),
        "restored": restored,
    }
    told = f"restored: {', '.join(restored)}\n" if restored else ""
    at = " and ".join((first, *further))
    show(document, output, lambda: f"{outcome}: programs at {at}, pins in {pins.root}\n{told}")


@click.command(cls=Command)
@take(Attachment)
@take_one(Node, "proc")
@click.option(
    "--end-capture",
    is_flag=True,
    help="End the capture of running mesh pods. Without it, pods that are captured are named and nothing is removed.",
)
@output_option
def detach(attachment: Attachment, proc: Path, end_capture: bool, output: str) -> None:
    """Remove the links, programs and maps.

    If mesh pods run, that ends their capture, and with it mTLS: open connections go on, new ones go past the proxies.
    So it needs --end-capture.
    """
    from bpf.attachment import detach_programs
    from installer.host.captured import StillCaptured, captured_pods, who_lost_capture

    pins = attachment.pins
    pods = captured_pods(pins, proc)
    if pods and not end_capture:
        raise StillCaptured(pods)
    found = detach_programs(pins)
    lines = [f"detached: pins in {pins.top} removed" if found else "nothing was attached"]
    lines += [who_lost_capture(pods)] if pods else []
    document = {"was_attached": found, "pins": str(pins.top), "lost_capture": pods}
    show(document, output, lambda: "\n".join(lines) + "\n")


@click.command(cls=Command)
@take(Attachment)
@take_one(Node, "cni_agent_run_dir")
@click.argument("level", metavar="LEVEL", type=click.Choice(list(LEVELS)))
@output_option
def accelerate(attachment: Attachment, cni_agent_run_dir: Path, level: str, output: str) -> None:
    """Set this node's acceleration level until the agent restarts.

    LEVEL is off, proxy or full. Open connections go on. If the new level is too low for them, their messages go by
    TCP from now on. A higher level helps new connections, and open ones that were accelerated before.
    """
    from bpf.tables import Tables
    from installer.acceleration.level import LevelKeeper

    with Tables(attachment.pins) as tables:
        keeper = LevelKeeper(attachment.pins, tables, attachment.attach_point(), cni_agent_run_dir)
        made = keeper.settle(LEVELS[level])
    document = {"level": str(made.level), "wanted": str(made.wanted), "reason": made.reason}
    show(document, output, lambda: f"acceleration: {made.level}{made.reason and f' ({made.reason})'}\n")
