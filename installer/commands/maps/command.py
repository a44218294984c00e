"""The command `maps`."""

import click

from installer.commands.command import Command, complete_pod, namespace_option, no_headers_option, qualified
from installer.commands.output import show, streaming_output_option
from installer.settings import Attachment, take

_IN_TABLE = 1000  # entries in a table, unless --limit is given


def _names(_: click.Context, __: click.Parameter, begun: str) -> list[str]:
    """The map names that a shell offers: all whose entries can be listed, even if nothing is attached now."""
    from bpf.layout import TABLES

    return [name for name in sorted(TABLES) if name.startswith(begun)]


@click.command(cls=Command)
@take(Attachment)
@click.argument("name", required=False, shell_complete=_names)
@click.option(
    "--pod",
    metavar="[NAMESPACE/]NAME",
    default="",
    shell_complete=complete_pod,
    help="Count or list only entries of this pod.",
)
@namespace_option("--pod is")
@no_headers_option
@click.option(
    "--limit",
    type=click.IntRange(1),
    help=f"List at most this many entries  [default: {_IN_TABLE} in a table, else all]",
)
@streaming_output_option
def maps(
    attachment: Attachment,
    name: str | None,
    pod: str,
    namespace: str,
    no_headers: bool,
    limit: int | None,
    output: str,
) -> None:
    """List the pinned maps, or the entries of the map NAME.

    Entries are shown in readable form, with addresses, ports, pods and flags. They are printed as they are read, in no
    particular order. The command changes nothing and needs no agent.
    """
    from installer.commands.maps.listing import listing_of, maps_of

    pod = pod and qualified(pod, namespace)
    if name is None:
        from installer.commands.maps.maps_table import maps_table
        from installer.commands.printing import rendered

        found = maps_of(attachment.pins, pod)
        show(found, output, lambda: rendered(maps_table(found, not no_headers)))
        return
    from installer.commands.maps.entry_text import pieces

    listing = listing_of(attachment.pins, name, pod, limit or (_IN_TABLE if output in ("table", "wide") else None))
    for piece in pieces(listing, output, not no_headers):
        click.echo(piece, nl=False)
