"""The command `trace`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from installer.commands.command import Command, complete_pod, namespace_option, qualified
from installer.commands.output import streaming_output_option
from installer.settings import PORT, Attachment, Node, take, take_one

if TYPE_CHECKING:
    from installer.commands.trace.wanted import Wanted

_DIRECTIONS = ("outbound", "inbound", "self", "dns")
_VERDICTS = ("direct", "captured", "refused", "denied", "unreachable")


def _rule(_: click.Context, __: click.Parameter, text: str | None) -> str | None:
    """A rule's code as the events have it, however it is written."""
    from bpf.layout import RULES

    if text is None:
        return None
    found = next((each for each in RULES if each and each.lower() == text.lower()), None)
    if found is None:
        raise click.BadParameter(f'there is no rule "{text}"; the rules are {", ".join(filter(None, RULES))}')
    return found


@click.command(cls=Command)
@take(Attachment)
@take_one(Node, "proc")
@take_one(Node, "cni_agent_run_dir")
@click.argument("pod", required=False, shell_complete=complete_pod)
@namespace_option("POD is")
@click.option(
    "--dest",
    metavar="DESTINATION",
    help="Only to this destination, for example 10.0.0.0/8, 10.1.2.3:80, [fd00::1]:80 or :80.",
)
@click.option(
    "--verdict",
    type=click.Choice(_VERDICTS),
    help="Only connections with this verdict. With refused, also when proxies start and stop listening.",
)
@click.option("--port", type=PORT, help="Only to this port.")
@click.option("--direction", type=click.Choice(_DIRECTIONS), help="Only connections in this direction.")
@click.option("--rule", metavar="RULE", callback=_rule, help="Only what this rule decided, such as O10 or deny.")
@click.option("--not", "is_inverted", is_flag=True, help="Only the events that the filters would leave out.")
@click.option(
    "--last",
    type=click.IntRange(1),
    metavar="N",
    help="Show the last N times that connections were refused or denied, as the agent has noticed them, and end. Only "
    "POD, --verdict and --direction choose among them.",
)
@click.option("--follow", "-f", is_flag=True, help="Run until Ctrl-C.")
@click.option(
    "--seconds", default=10.0, show_default=True, type=click.FloatRange(0.1), help="How long to run without --follow."
)
@streaming_output_option
def trace(
    attachment: Attachment,
    proc: Path,
    cni_agent_run_dir: Path,
    pod: str | None,
    namespace: str,
    dest: str | None,
    verdict: str | None,
    port: int | None,
    direction: str | None,
    rule: str | None,
    is_inverted: bool,
    last: int | None,
    follow: bool,
    seconds: float,
    output: str,
) -> None:
    """Show connections and their verdicts as they happen.

    An address of an enrolled pod is shown with the pod's name, the proxy's process as "proxy", and the rule of each
    verdict in words. It also shows when proxies start and stop listening, and processes that are killed. UDP is shown
    only if it is captured DNS or denied.

    POD is NAME or NAMESPACE/NAME; without it, all pods are traced. A node can run one trace at a time. As json or
    jsonl, the output is one object per line. Events that cannot be read in time are lost and counted; no connection
    waits for the trace. The last line says how many events there were, and how many were lost.

    The trace ends when its reader has gone: the reader of its output, or whoever holds its standard input. So give
    `kubectl exec` the option -i (or -it), and the trace ends with it.

    While nobody traces, single connections are not recorded. But the agent looks at the counters every few seconds, so
    --last can tell when which pod's connections were refused or denied, how many, and why.
    If another version of sidestep takes the node's pods over, the trace ends with exit status 1.
    """
    pod = pod and qualified(pod, namespace)
    if last is not None:
        if dest or port is not None or rule or is_inverted or follow:
            raise click.UsageError("--last goes with POD, --verdict and --direction alone")
        from installer.commands.trace.last import Chosen, show_last

        show_last(cni_agent_run_dir, Chosen(last, pod, verdict, direction), output)
        return
    if is_inverted and (dest, verdict, port, direction, rule) == (None,) * 5:
        raise click.UsageError("--not needs a filter: without one it leaves out all events")
    from installer.commands.trace.follow_events import follow_events

    follow_events(
        attachment.pins,
        proc,
        pod,
        _wanted(dest, verdict, port, direction, rule, is_inverted),
        None if follow else seconds,
        output,
    )


def _wanted(dest: str | None, *further: Any) -> "Wanted":
    from installer.commands.trace.wanted import BadFilter, Wanted

    try:
        return Wanted.of(dest, *further)
    except BadFilter as error:
        raise click.BadParameter(str(error), param_hint="'--dest'") from None
