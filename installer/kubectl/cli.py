"""The commands of `kubectl sidestep`."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from installer import VERSION
from installer.kubectl.agents import Nodes
from installer.kubectl.cluster_status import UNKNOWN, every_pod, every_status, show_pods, show_status, verdict_on
from installer.kubectl.connectivity import trials
from installer.kubectl.kubectl import Kubectl, KubectlFailed
from installer.kubectl.trial_pods import trial_pods
from installer.kubectl.whereabouts import find_pod, in_url, named_pod

# commands of the agent's own `sidestep` that are about one pod, their first argument
_ABOUT_A_POD = {
    "explain": "Say what becomes of a pod's connection, and why.",
    "coverage": "Show what goes past a pod's proxy.",
    "flows": "Show what a pod's connections carry, and with whom.",
    "shadow": "Show whether sidestep decides for a pod as Istio's rules do.",
    "trace": "Follow a pod's connections live.",
    "takeover": "Have sidestep capture a running pod instead of Istio's rules.",
    "giveback": "Put Istio's rules back in a pod that was taken over.",
}
_ENDLESS = ("trace", "top")  # they go on until Ctrl-C
_READY_SECONDS = 120


class Cluster:
    """The cluster that the options name; its nodes are asked for when somebody needs them."""

    def __init__(self, options: tuple[str, ...], agents_namespace: str) -> None:
        self.kubectl, self._agents_namespace = Kubectl(options), agents_namespace

    def nodes(self) -> Nodes:
        """Raises KubectlFailed."""
        return Nodes.of(self.kubectl, self._agents_namespace)

    def own_namespace(self) -> str:
        """The kubeconfig's. Without a current context it is kubectl's own default."""
        try:
            told = self.kubectl.run("config", "view", "--minify", "--output", "jsonpath={..namespace}")
        except KubectlFailed as error:
            if not str(error).startswith("current-context must exist"):
                raise
            return "default"
        return told.strip() or "default"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, "--version", prog_name="kubectl sidestep", message="%(prog)s %(version)s")
@click.option("--context", metavar="NAME", help="As kubectl has it.")
@click.option("--kubeconfig", metavar="FILE", help="As kubectl has it.")
@click.option(
    "--agents-namespace", metavar="NAME", default="", help="Where the agents are  [default: they are looked for]"
)
@click.pass_context
def cli(ctx: click.Context, context: str | None, kubeconfig: str | None, agents_namespace: str) -> None:
    """Ask sidestep's agents from here: the whole cluster, or the agent of a pod's node.

    \b
        kubectl sidestep status                  is capture well, on every node?
        kubectl sidestep pods -A                 every mesh pod, and its state
        kubectl sidestep explain shop/web-0 10.0.0.7:443
        kubectl sidestep on NODE top             any other command, on one node
        kubectl sidestep test                    make connections, see whether they are captured
    """  # noqa: D301 (after \b, click keeps a paragraph's line breaks)
    named = {"--context": context, "--kubeconfig": kubeconfig}
    ctx.obj = Cluster(tuple(f"{name}={value}" for name, value in named.items() if value), agents_namespace)


def _json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", help="Output format.")(
        command
    )


@cli.command()
@_json_option
@click.pass_obj
def status(cluster: Cluster, output: str) -> None:
    """Show one verdict on the cluster, a line for each node, and what to do.

    The exit status is 0 only if all is well, 1 if something is wrong, and 3 if it can't be told.
    """
    found = every_status(cluster.kubectl, cluster.nodes())
    if output == "json":
        state, line = verdict_on(found)
        click.echo(json.dumps({"state": state, "headline": line, "nodes": [asdict(each) for each in found]}, indent=2))
        sys.exit({"ok": 0, UNKNOWN: 3}.get(state, 1))
    sys.exit(show_status(found))


@cli.command()
@click.argument("name", required=False)
@click.option("-n", "--namespace", metavar="NAME", help="[default: the kubeconfig's]")
@click.option("-A", "--all-namespaces", "everywhere", is_flag=True, help="List the pods of all namespaces.")
@_json_option
@click.pass_obj
def pods(cluster: Cluster, name: str | None, namespace: str | None, everywhere: bool, output: str) -> None:
    """List the mesh pods of all nodes, or show everything about one.

    NAME is the pod's NAME or NAMESPACE/NAME. The exit status is 3 if an agent does not tell.
    """
    if name:
        sys.exit(_on_pods_node(cluster, "pods", name, namespace, ("--output", output)))
    wanted = "" if everywhere else namespace or cluster.own_namespace()
    found, silent = every_pod(cluster.nodes())
    if output == "json":
        click.echo(json.dumps([each for each in found if wanted in ("", each["pod"].partition("/")[0])], indent=2))
    else:
        show_pods(found, wanted)
    for sentence in silent:
        click.echo(f"? {sentence}", err=True)
    sys.exit(3 if silent else 0)


def _about_a_pod(command: str, words: str) -> click.Command:
    @click.command(command, help=f"{words} `sidestep {command} --help` in an agent has its arguments and options.")
    @click.argument("pod")
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    @click.option("-n", "--namespace", metavar="NAME", help="[default: the kubeconfig's]")
    @click.pass_obj
    def run(cluster: Cluster, pod: str, arguments: tuple[str, ...], namespace: str | None) -> None:
        if command == "explain" and arguments and (called := named_pod(arguments[0])):
            sys.exit(_explained(cluster, (pod, *called), namespace or cluster.own_namespace(), arguments[1:]))
        sys.exit(_on_pods_node(cluster, command, pod, namespace, arguments))

    run.context_settings = {"ignore_unknown_options": True}
    return run


for _name, _words in _ABOUT_A_POD.items():
    cli.add_command(_about_a_pod(_name, _words))


@cli.command("on", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("node")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_obj
def on(cluster: Cluster, node: str, command: tuple[str, ...]) -> None:
    """Run `sidestep COMMAND` in the agent of one node."""
    agent = cluster.nodes().agent_on(node)
    sys.exit(agent.follow(*command, is_endless=command[0] in _ENDLESS, has_terminal=_has_terminal()))


@cli.command()
@click.option(
    "--label",
    "labels",
    multiple=True,
    default=["istio-injection=enabled"],
    show_default=True,
    metavar="NAME=VALUE",
    help="Of the namespace: it asks istiod for sidecars. May be given again.",
)
@click.option(
    "--node",
    "wanted",
    multiple=True,
    metavar="NAME",
    help="Where the pods run, two at most; the first gets two of them.  [default: the first two with an agent]",
)
@click.option("--image", metavar="NAME", help="Of the pods; it needs sidestep's Python.  [default: the agent's]")
@click.option(
    "--timeout",
    "seconds",
    type=click.IntRange(1),
    default=_READY_SECONDS,
    show_default=True,
    help="Seconds until the pods must be ready.",
)
@click.pass_obj
def test(cluster: Cluster, labels: tuple[str, ...], wanted: tuple[str, ...], image: str | None, seconds: int) -> None:
    """Make connections between throw-away mesh pods, and say whether they were captured.

    Two pods are made on one node and one on another, in a namespace of their own that is deleted at the end. The exit
    status is 0 only if every connection was captured at both ends.
    """
    nodes = cluster.nodes()
    places = list(wanted[:2]) or [name for name, agent in nodes.agents.items() if agent][:2]
    if not places:
        raise click.ClickException("no node has an agent, so nothing would be captured")
    agents = [nodes.agent_on(place) for place in places]
    asks = dict(each.partition("=")[::2] for each in labels)
    good = of = 0
    with trial_pods(cluster.kubectl, image or agents[0].image, [places[0], *places], asks, seconds) as made:
        for each in trials(cluster.kubectl, agents, made):
            click.echo(f"{'✗' if each.wrong else '✓'} {each.what}: {each.wrong or 'captured at both ends'}")
            good, of = good + (not each.wrong), of + 1
    if len(places) == 1:
        click.echo("· only one node has an agent, so nothing was tried across nodes")
    click.echo(f"test: {good} of {of} captured")
    sys.exit(0 if good == of else 1)


@cli.command()
@click.option(
    "-d",
    "--directory",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False, exists=True, writable=True),
    default=".",
    show_default=True,
    help="Where the archives go.",
)
@click.pass_obj
def bugreport(cluster: Cluster, directory: Path) -> None:
    """Write one archive for each node, with all that is known of it, for whoever looks into a fault.

    The exit status is 1 if one could not be had; the others are there then.
    """
    faults, nodes = 0, cluster.nodes()
    for name in nodes.agents:
        try:
            made = nodes.agent_on(name).printed("bugreport")
            file = directory / f"sidestep-bugreport-{name}.tar.gz"
            file.write_bytes(made)
            click.echo(file)
        except (click.ClickException, OSError) as error:
            faults += 1
            click.echo(f"{name}: {error}", err=True)
    sys.exit(1 if faults else 0)


def _on_pods_node(cluster: Cluster, command: str, pod: str, namespace: str | None, arguments: tuple[str, ...]) -> int:
    """Run a command about a pod in the agent of its node; its exit status."""
    found = find_pod(cluster.kubectl, pod, namespace or cluster.own_namespace())
    agent = cluster.nodes().agent_on(found.node)
    return agent.follow(command, found.pod, *arguments, is_endless=command in _ENDLESS, has_terminal=_has_terminal())


def _explained(cluster: Cluster, asked: tuple[str, str, str], namespace: str, options: tuple[str, ...]) -> int:
    """Explain a connection from one pod to another: client, server, port. On two nodes each agent knows one half.

    `options` are the first half's. Returns the exit status, the worse of two.
    """
    client, server = (find_pod(cluster.kubectl, pod, namespace) for pod in asked[:2])
    port, nodes = asked[2], cluster.nodes()
    how = {"is_endless": False, "has_terminal": _has_terminal()}
    if client.node == server.node:
        to = f"{server.pod}:{port}" if port else server.pod
        return nodes.agent_on(client.node).follow("explain", client.pod, to, *options, **how)
    if not port:
        raise click.ClickException(f"{client.pod} and {server.pod} are on two nodes; give a port: {asked[1]}:PORT")
    click.echo(f"{client.pod}, as {client.node} has it:")
    here = ("explain", client.pod, f"{in_url(server.address)}:{port}", *options)
    first = nodes.agent_on(client.node).follow(*here, **how)
    click.echo(f"\n{server.pod}, as {server.node} has it:")
    there = ("explain", server.pod, "--inbound", client.address, "--port", port)
    return max(first, nodes.agent_on(server.node).follow(*there, **how))


def _has_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def main() -> None:
    """The entry point. Nothing that a user does ends in a traceback."""
    try:
        cli(prog_name="kubectl sidestep")
    except KeyboardInterrupt:
        sys.exit(130)
