"""What is in the pinned maps."""

import click

from installer.commands.output import output_option, show
from installer.settings import Attachment, take

_IN_TABLE = 1000  # entries, unless more are asked for


def _names(_: click.Context, __: click.Parameter, begun: str) -> list[str]:
    """What a shell offers: the maps whose entries can be listed, whether or not they are there."""
    from bpf.layout import TABLES

    return [name for name in sorted(TABLES) if name.startswith(begun)]


@click.command()
@take(Attachment)
@click.argument("name", required=False, shell_complete=_names)
@click.option("--pod", metavar="[NAMESPACE/]NAME", default="", help="Only what is about this pod.")
@click.option("--limit", type=click.IntRange(1), help=f"Entries at most  [default: {_IN_TABLE} in a table, else all]")
@output_option
def maps(attachment: Attachment, name: str | None, pod: str, limit: int | None, output: str) -> None:
    """List the pinned maps, or the entries of the one called NAME in words: addresses, ports, pods, flags.

    Entries are in no order, and printed as they are read. Nothing is changed, and no agent is needed.
    """
    from installer.commands.maps.listing import listing_of, maps_of

    if name is None:
        from installer.commands.maps.maps_table import maps_table
        from installer.commands.printing import rendered

        found = maps_of(attachment.pins, pod)
        show(found, output, lambda: rendered(maps_table(found)))
        return
    from installer.commands.maps.entry_text import pieces

    listing = listing_of(attachment.pins, name, pod, limit or (_IN_TABLE if output == "table" else None))
    for piece in pieces(listing, output):
        click.echo(piece, nl=False)
