"""What all commands have in common: how --help is laid out, and the options that kubectl's users expect."""

from collections.abc import Callable
from typing import Any

import click

from installer.settings import Setting

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Command(click.Command):
    """A command whose --help lists its own options first, and the agent's settings apart from them."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in two lists."""
        own: list[tuple[str, str]] = []
        settings: list[tuple[str, str]] = []
        for each in self.get_params(ctx):
            if record := each.get_help_record(ctx):
                (settings if isinstance(each, Setting) else own).append(record)
        if own:
            with formatter.section("Options"):
                formatter.write_dl(own)
        if settings:
            with formatter.section("The agent's settings, which its container has in the environment"):
                formatter.write_dl(settings)


def complete_pod(ctx: click.Context, _: click.Parameter, begun: str) -> list[str]:
    """The names of enrolled pods that a shell offers; none if this user may not read them."""
    from bpf.errors import SidestepError
    from installer.settings import Attachment, default_of

    bpffs = ctx.params.get("bpffs") or default_of(Attachment, "bpffs")
    try:
        from installer.commands.names import enrolled_names

        names = enrolled_names(Attachment(bpffs=bpffs).pins)
    except (SidestepError, OSError):
        return []
    wanted = ctx.params.get("namespace") or ""
    fitting = [name for name in names if wanted in ("", name.partition("/")[0])]
    if "/" not in begun:
        last = [name.partition("/")[2] for name in fitting]
        # a name that pods of several namespaces have does not say which is meant
        fitting = [name if last.count(each) > 1 else each for name, each in zip(fitting, last, strict=True)]
    return [each for each in fitting if each.startswith(begun)]


def namespace_option(of: str) -> Decorator:
    """The option -n. `of` says in the help what it chooses."""
    return click.option("-n", "--namespace", metavar="NAME", default="", help=f"{of} of this namespace.")


def all_namespaces_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The option -A, which is what happens without -n. Users of kubectl type it."""
    return click.option(
        "-A", "--all-namespaces", "everywhere", is_flag=True, help="Pods of all namespaces; that is the default."
    )(command)


def no_headers_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The option --no-headers, for scripts."""
    return click.option(
        "--no-headers", is_flag=True, help="Print only the table's rows: no titles, and no lines below it."
    )(command)


def one_namespace(namespace: str, everywhere: bool) -> str:
    """The namespace that the options choose, "" for all. Raises UsageError if they contradict each other."""
    if namespace and everywhere:
        raise click.UsageError("give either -n or -A")
    return namespace


def qualified(name: str, namespace: str) -> str:
    """A pod's name with the namespace that -n gives, unless the name has one."""
    return f"{namespace}/{name}" if namespace and "/" not in name else name
