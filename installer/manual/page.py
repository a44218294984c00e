"""One command as the manual shows it, read from click's objects: whatever --help says and nothing else."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import click

from installer.commands.cli import NAME, cli
from installer.commands.ending import STATUSES

VERBATIM = "\b"  # click's mark of a paragraph that stays as it is

# what is true of all commands, as term and text
ENVIRONMENT = (
    (
        "SIDESTEP_…, and the names that Istio's install-cni has",
        "Each option names its variable; the option goes before.",
    ),
    ("SIDESTEP_DEBUG=1", "Show the traceback of an internal error instead of writing it to a file."),
    ("TMPDIR", "Where that file goes if there is no run directory."),
)
FILES = (
    (
        "/sys/fs/bpf/sidestep/v1/",
        "Pinned maps, programs and links: the only state. Commands read them without an agent.",
    ),
    ("/run/sidestep/cni.sock", "The socket on which the plugin asks the agent; root's alone."),
    ("/run/sidestep/crash-….txt", "What is to be attached to the report of an internal error; the last ten."),
    ("/etc/cni/net.d/, /opt/cni/bin/sidestep-cni", "The CNI configuration and the plugin, with `--install`."),
)
EXIT = tuple((str(status), text) for status, text in STATUSES)


@dataclass(frozen=True)
class Paragraph:
    """Text to be filled, or lines to be kept."""

    text: str
    verbatim: bool


@dataclass(frozen=True)
class Page:
    """A command, or the root of them."""

    words: tuple[str, ...]  # sidestep, then the command's
    brief: str
    usage: str
    paragraphs: tuple[Paragraph, ...]
    options: tuple[tuple[str, str], ...]
    commands: tuple[tuple[str, str], ...]

    @property
    def command(self) -> str:
        """As it is typed."""
        return " ".join(self.words)

    @property
    def name(self) -> str:
        """As man(1) looks for it."""
        return "-".join(self.words)


def pages() -> Iterator[Page]:
    """The root's page first, then each command's, by name."""
    yield from _pages(cli, click.Context(cli, info_name=NAME, **cli.context_settings), (NAME,))


def _pages(command: click.Command, context: click.Context, words: tuple[str, ...]) -> Iterator[Page]:
    below = []
    if isinstance(command, click.Group):
        names = command.list_commands(context)
        below = [(name, found) for name in names if (found := command.get_command(context, name)) and not found.hidden]
    records = (each.get_help_record(context) for each in command.get_params(context))
    yield Page(
        words=words,
        brief=_brief(command),
        usage=" ".join(command.collect_usage_pieces(context)),
        paragraphs=tuple(_paragraphs(command.help or "")),
        options=tuple((flags, " ".join(text.split())) for flags, text in filter(None, records) if text),
        commands=tuple((name, _brief(found)) for name, found in below),
    )
    for name, found in below:
        yield from _pages(found, click.Context(found, info_name=name, parent=context), (*words, name))


def _brief(command: click.Command) -> str:
    return command.get_short_help_str(limit=200).removesuffix(".")


def _paragraphs(text: str) -> Iterator[Paragraph]:
    for part in inspect.cleandoc(text.partition("\f")[0]).split("\n\n"):
        verbatim = part.startswith(VERBATIM)
        kept = part.removeprefix(VERBATIM).strip("\n")
        yield Paragraph(kept if verbatim else " ".join(kept.split()), verbatim)
