"""Every command that only looks works while nobody serves: what it tells is in the pins."""

from collections.abc import Iterator

import pytest

from tests.lab.invocation import sidestep
from tests.lab.node import Node
from tests.node.conftest import Mesh
from tests.node.test_top import shown


@pytest.fixture(scope="module")
def orphan() -> Iterator[Node]:
    """A node whose agent was killed, with two pods."""
    with Node() as node:
        node.pod("alpha", annotations={"sidestep.io/deny-outbound-ports": "25"})
        node.pod("beta")
        node.agent.kill()
        yield node


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("status", "--cni-agent-run-dir", "{run}"), "✗ agent: {run}/cni.sock: nobody is there"),
        (("status", "--cni-agent-run-dir", "{run}", "--output", "json"), '"attached": true'),
        (("pods", "--pods", "{pods}"), " beta "),
        (("pods", "beta", "--pods", "{pods}"), "asks for the same"),
        (("explain", "alpha", "{beta}:8080", "--try"), "as explained"),
        (("explain", "beta", "--inbound", "{alpha}", "--port", "8080", "--try"), "as explained"),
        (("maps",), "port_rules"),
        (("maps", "pods", "--pod", "alpha"), "default/alpha"),
        (("deny",), " alpha "),
        (("deny", "--kill"), "0 connections reset"),
        (("report", "--seconds", "0.2"), "default/beta"),
        (("report", "--seconds", "0.2", "--output", "yaml"), "pod: default/beta"),
        (("trace", "alpha", "--seconds", "0.5"), ""),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_what_only_looks_needs_no_agent(orphan: Node, argv: tuple[str, ...], told: str) -> None:
    names = {"run": orphan.run_dir, "pods": orphan.pods_dir}
    names |= {name: pod.ip4 for name, pod in orphan.pods.items()}  # type: ignore[misc]
    before = orphan.policies()
    command, *rest = (each.format(**names) for each in argv)
    done = sidestep(command, "--bpffs", orphan.bpffs, *rest)
    assert done.returncode == (command == "status"), done.stderr  # which says that the agent is away
    assert done.stderr in ("", "tracing\ntraced: 0 events, 0 lost\n")
    assert told.format(**names) in done.stdout
    after = orphan.policies()
    for each in (before, after):  # what connections come and go in
        for passing in ("handshakes", "accelerated", "meetings", "dials"):
            del each[passing]
    assert after == before


def test_top_needs_none_either(orphan: Node) -> None:
    alpha, beta = orphan.pods["alpha"], orphan.pods["beta"]
    with shown(Mesh(orphan, alpha, beta, beta)) as terminal:
        terminal.shows("default/alpha", "default/beta", "attached", "2 pods")
        terminal.press(b"q")
        assert terminal.ends() == 0
