"""The commands `takeover` and `giveback`."""

from typing import Any, Literal

import click

from bpf.errors import SidestepError
from installer.commands.command import Command, complete_pod, namespace_option
from installer.commands.output import output_option, show
from installer.settings import Node, take


class NotAllExchanged(SidestepError):
    """Some pods were not exchanged, or that is not known. The message names them and the reasons."""


@click.command(cls=Command)
@take(Node)
@click.argument("names", metavar="[POD]...", nargs=-1)
@click.option("--all", "is_all", is_flag=True, help="All running pods of this node that Istio's rules capture.")
@namespace_option("Pods")
@output_option
def takeover(node: Node, names: tuple[str, ...], is_all: bool, namespace: str, output: str) -> None:
    """Have sidestep capture running pods instead of Istio's rules.

    POD is NAME or NAMESPACE/NAME. The agent enrols the pod beside the rules that Istio's plugin has written, sees that
    sidestep captures it, and then removes the rules. No container restarts, and no connection ends: those that are open
    go on as they are, new ones are captured by sidestep. If a step fails, the rules capture the pod as before, or the
    message says what is left of them. The agent keeps the rules, so that `giveback` can put them back.

    \b
        sidestep takeover shop/web-0      one pod
        sidestep takeover --all           all pods of this node
    """  # noqa: D301 (after \b, click keeps a paragraph's line breaks)
    _exchange(node, "TAKE_OVER", names, is_all, namespace, output)


@click.command(cls=Command)
@take(Node)
@click.argument("names", metavar="[POD]...", nargs=-1, shell_complete=complete_pod)
@click.option("--all", "is_all", is_flag=True, help="All pods of this node that were taken over.")
@namespace_option("Pods")
@output_option
def giveback(node: Node, names: tuple[str, ...], is_all: bool, namespace: str, output: str) -> None:
    """Give running pods back to the rules of Istio's that they had before `takeover`.

    POD is NAME or NAMESPACE/NAME. The agent puts the rules back and then has sidestep capture nothing more in the pod.
    No container restarts, and no connection ends. A pod that sidestep has captured from its start has no such rules: it
    must be created anew where Istio's plugin is in the CNI chain.

    \b
        sidestep giveback shop/web-0      one pod
        sidestep giveback --all           all pods of this node that were taken over
    """  # noqa: D301 (after \b, click keeps a paragraph's line breaks)
    _exchange(node, "GIVE_BACK", names, is_all, namespace, output)


def _exchange(
    node: Node,
    command: Literal["TAKE_OVER", "GIVE_BACK"],
    names: tuple[str, ...],
    is_all: bool,
    namespace: str,
    output: str,
) -> None:
    if bool(names) == is_all:
        raise click.UsageError("give either the names of pods or --all")
    from installer.commands.takeover.exchanged import every_pod, exchanged_text, exchanges, named_pods

    pods = every_pod(node, command, namespace) if is_all else named_pods(node, names, namespace)
    documents: list[dict[str, Any]] = exchanges(node.cni_agent_run_dir, command, pods)
    show(documents, output, lambda: exchanged_text(documents))
    if problems := [f"{each['pod']}: {each['problem']}" for each in documents if each["problem"]]:
        raise NotAllExchanged(f"{len(problems)} of {len(documents)} pods not exchanged: {'; '.join(problems)}")
